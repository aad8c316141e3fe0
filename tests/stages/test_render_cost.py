"""What a drawing computes, counted: nothing twice, nothing for padding, nothing for no guidance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kelix_rt import RenderParams
from kelix_rt.models.dit import KelixDiT
from kelix_rt.stages.denoise import KEPT_STEPS, Denoiser, RenderState
from tests.engine_helpers import fixtures, load_engine

STEPS, VALID, PADDED = 6, 7, 12
TIME = ("time_in", "time_out", "time_modulation")
# Of a block and step: q|k|v, output, cross q, cross output, two of the feed-forward.
PER_BLOCK = 6


class Counts:
    """Calls of every Linear layer, and the rows it was given, by name."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.flops = 0

    def add(self, name: str, layer: nn.Linear, x: Tensor) -> None:
        rows = x.numel() // layer.in_features
        self.calls[name] += 1
        self.rows[name] += rows
        self.flops += 2 * rows * layer.in_features * layer.out_features


@contextmanager
def counted(dit: KelixDiT) -> Iterator[Counts]:
    counts = Counts()
    hooks = []
    for name, layer in dit.named_modules():
        if isinstance(layer, nn.Linear):

            def note(layer: Any, inputs: Any, _: Any, name: str = name) -> None:
                counts.add(name, layer, inputs[0])

            hooks.append(layer.register_forward_hook(note))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def condition_layers(dit: KelixDiT) -> set[str]:
    """The layers that see the condition alone."""
    names = {"connector_in", "connector_out", "caption_in", "caption_out"}
    return names | {f"blocks.{i}.cross.kv" for i in range(dit.config.depth)}


def step_layers(dit: KelixDiT) -> set[str]:
    """The layers that see the latent."""
    linear = {name for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)}
    found = linear - condition_layers(dit) - set(TIME)
    assert len(found) == PER_BLOCK * dit.config.depth + 2
    return found


@pytest.fixture(scope="module")
def dit(golden: Path) -> KelixDiT:
    return KelixDiT.from_pretrained(golden / "dit" / "tiny_release")


@pytest.fixture
def denoiser(dit: KelixDiT) -> Denoiser:
    return Denoiser(dit)


def tokens(dit: KelixDiT) -> int:
    return (dit.config.input_size // dit.config.patch_size) ** 2


def start(denoiser: Denoiser, valid: int = VALID, **options: Any) -> RenderState:
    """A drawing whose condition is padded to more tokens than are valid."""
    dit = denoiser.dit
    generator = torch.Generator().manual_seed(valid)
    condition = torch.randn(1, PADDED, dit.condition_channels, generator=generator)
    mask = (torch.arange(PADDED) < valid).long().unsqueeze(0)
    side = dit.config.input_size
    latent = torch.randn(1, dit.config.in_channels, side, side, generator=generator)
    cache = dit.prepare_condition(condition, mask)
    return denoiser.start(cache, latent, STEPS, **options)


def run(denoiser: Denoiser, states: list[RenderState]) -> None:
    for _ in range(STEPS):
        denoiser.step(states)


def test_the_condition_and_the_times_are_computed_once(dit: KelixDiT, denoiser: Denoiser) -> None:
    with counted(dit) as counts:
        run(denoiser, [start(denoiser)])
    for name in condition_layers(dit):
        assert (counts.calls[name], counts.rows[name]) == (1, VALID), name
    for name in TIME:
        assert (counts.calls[name], counts.rows[name]) == (1, STEPS), name
    for name in step_layers(dit):
        assert (counts.calls[name], counts.rows[name]) == (STEPS, STEPS * tokens(dit)), name


def test_a_schedule_is_computed_for_the_first_drawing_only(
    dit: KelixDiT, denoiser: Denoiser
) -> None:
    start(denoiser)
    with counted(dit) as counts:
        run(denoiser, [start(denoiser, valid=5)])
    assert not any(counts.calls[name] for name in TIME)
    with counted(dit) as counts:
        start(denoiser, scheduler="dpm++")
    assert counts.calls["time_in"] == 1


def test_schedules_are_kept_for_a_few_hundred_steps(dit: KelixDiT, denoiser: Denoiser) -> None:
    """The oldest go first; one that is longer than that lives as long as its drawing."""
    for shift in range(1, 40):
        start(denoiser, shift=float(shift))
    assert sum(plan.steps for plan in denoiser._plans.values()) == KEPT_STEPS // STEPS * STEPS
    with counted(dit) as counts:
        start(denoiser, shift=39.0)
        start(denoiser, shift=1.0)
    assert counts.calls["time_in"] == 1
    cache = start(denoiser).condition
    longest = denoiser.start(cache, torch.zeros(1, 8, 8, 8), KEPT_STEPS + 1)
    assert longest.steps == KEPT_STEPS + 1 and not denoiser._plans


def test_drawings_share_the_calls_of_a_step(dit: KelixDiT, denoiser: Denoiser) -> None:
    """Of different lengths, so that one is padded; joining them computes nothing again."""
    states = [start(denoiser, valid) for valid in (3, 7, 12)]
    with counted(dit) as counts:
        run(denoiser, states)
    assert set(counts.calls) == step_layers(dit)
    for name in step_layers(dit):
        assert (counts.calls[name], counts.rows[name]) == (STEPS, 3 * STEPS * tokens(dit)), name


def test_without_guidance_there_is_no_other_half(dit: KelixDiT, denoiser: Denoiser) -> None:
    with counted(dit) as plain:
        run(denoiser, [start(denoiser)])
    with counted(dit) as guided:
        run(Denoiser(dit), [start(denoiser, cfg=3.0)])
    for name in step_layers(dit):
        assert guided.rows[name] == 2 * plain.rows[name]
        assert guided.calls[name] == plain.calls[name], "both halves are one batch"


def test_guided_drawings_share_the_unconditional_half(dit: KelixDiT, denoiser: Denoiser) -> None:
    first = start(denoiser, cfg=3.0)
    with counted(dit) as counts:
        second = start(denoiser, valid=5, cfg=5.0)  # as long as another: no position hangs on it
    for name in condition_layers(dit):
        assert counts.rows[name] == 5, name
    assert second.uncond is first.uncond
    del first, second
    assert len(denoiser._unconditional) == 0, "its memory goes with the last drawing"
    with counted(dit) as counts:
        start(denoiser, cfg=3.0)
    assert counts.calls["caption_in"] == 2


def test_a_drawing_costs_what_the_formula_says(dit: KelixDiT, denoiser: Denoiser) -> None:
    """In products of matrices, against evaluating everything in every step for both halves."""
    config = dit.config
    width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    area = config.patch_size**2
    with counted(dit) as counts:
        run(denoiser, [start(denoiser)])
    captions = config.caption_channels
    block = 3 * width * width + 3 * width * width + 2 * width * inner + inner * width
    ends = config.in_channels * area * width + width * area * dit.out_channels
    latent = tokens(dit) * (config.depth * block + ends)
    connector = dit.condition_channels * captions + captions * captions
    keys = config.depth * 2 * width * width
    condition = connector + captions * width + width * width + keys
    times = 256 * width + width * width + 6 * width * width
    assert counts.flops == 2 * (STEPS * latent + VALID * condition + STEPS * times)


def test_the_engine_draws_on_this_path(golden: Path) -> None:
    """Through all stages: the condition is as long as the image, not as the longest one."""
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    engine = load_engine(golden / "llm" / "tiny_a", **parts)
    dit = engine.runner.render.dit
    prompt = fixtures(golden / "llm" / "tiny_a")["cond/prompt_ids2d"]
    with counted(dit) as counts:
        output = engine.generate_image(prompt, render=RenderParams(steps=STEPS, seed=1))
    assert output.condition_length < engine.options.max_condition_length
    used = {name for name in condition_layers(dit) if counts.calls[name]}
    assert {"caption_in", "blocks.0.cross.kv"} <= used
    for name in used:
        assert (counts.calls[name], counts.rows[name]) == (1, output.condition_length), name
    assert counts.rows["time_in"] == STEPS
    for name in step_layers(dit):
        assert (counts.calls[name], counts.rows[name]) == (STEPS, STEPS * tokens(dit)), name
