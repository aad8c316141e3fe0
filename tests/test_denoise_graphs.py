"""Recorded evaluations of the image DiT against eager ones, over whole drawings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kelix_rt import Engine, RenderParams
from kelix_rt.denoise_graphs import DENOISE_ROWS, DenoiseGraphs
from kelix_rt.graphs import GraphCounts
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_positions import image_rotary, sincos_table
from kelix_rt.stages.denoise import Denoiser, RenderState
from tests.engine_helpers import load_engine
from tests.graph_tape import Recording, record

CAPACITY, STEPS = 12, 4
DITS = ("dit/tiny_release", "dit/tiny_alt", "e2e_dit/dit")
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


@pytest.fixture(params=DITS)
def dit(request: pytest.FixtureRequest, golden: Path) -> KelixDiT:
    return KelixDiT.from_pretrained(golden / request.param)


def make(dit: KelixDiT, recorder: Recorder | None = record) -> tuple[Denoiser, GraphCounts]:
    """A denoiser whose evaluations are recorded, or are eager without a recorder."""
    counts, denoiser = GraphCounts(), Denoiser(dit)
    if recorder is not None:
        graphs = DenoiseGraphs(dit, CAPACITY, counts)
        graphs.capture(recorder)
        denoiser.evaluate = graphs.evaluate
    return denoiser, counts


def start(denoiser: Denoiser, length: int, **options: Any) -> RenderState:
    """A drawing at the model's own size (smaller: by that many rows)."""
    dit, generator = denoiser.dit, torch.Generator().manual_seed(length)
    side, smaller = dit.config.input_size, options.pop("smaller", 0)
    shape = (1, dit.config.in_channels, side - smaller, side)
    condition = torch.randn(1, length, dit.condition_channels, generator=generator)
    cache = dit.prepare_condition(condition, capacity=CAPACITY)
    latent = torch.randn(shape, generator=generator)
    return denoiser.start(cache, latent, STEPS, **options)


def draw(denoiser: Denoiser, lengths: tuple[int, ...], **options: Any) -> list[Tensor]:
    states = [start(denoiser, length, **options) for length in lengths]
    for _ in range(STEPS):
        denoiser.step(states)
    return [state.latent for state in states]


@pytest.mark.parametrize(
    "options",
    [{}, {"cfg": 3.0}, {"scheduler": "dpm++"}, {"cfg": 2.0, "scheduler": "dpm++"}],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 5, CAPACITY])
def test_one_graph_serves_all_steps_and_drawings(
    dit: KelixDiT, length: int, options: dict[str, Any]
) -> None:
    eager, (denoiser, counts) = make(dit, None)[0], make(dit)
    for one in (length, 7, length):
        expected, got = draw(eager, (one,), **options), draw(denoiser, (one,), **options)
        torch.testing.assert_close(got[0], expected[0], atol=2e-5, rtol=1e-5)
    assert (counts.replays, counts.misses) == (3 * STEPS, 0)


def test_two_drawings_of_different_lengths(dit: KelixDiT) -> None:
    eager, (denoiser, counts) = make(dit, None)[0], make(dit)
    for expected, got in zip(draw(eager, (3, 9)), draw(denoiser, (3, 9)), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert counts.replays == STEPS


def test_drawings_take_turns(dit: KelixDiT) -> None:
    """Each step finds the condition of the other one in the buffers."""
    eager, (denoiser, _) = make(dit, None)[0], make(dit)
    states = [start(denoiser, length) for length in (9, 4)]
    for _ in range(STEPS):
        for state in states:
            denoiser.step([state])
    for state, length in zip(states, (9, 4), strict=True):
        (expected,) = draw(eager, (length,))
        torch.testing.assert_close(state.latent, expected, atol=2e-5, rtol=1e-5)


def test_a_copy_that_was_cut_short_is_not_taken_for_whole(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dit = KelixDiT.from_pretrained(golden / DITS[0])
    eager, (denoiser, _) = make(dit, None)[0], make(dit)
    first, second = start(denoiser, 9), start(denoiser, 4)
    denoiser.step([first])

    def no_memory(values: object, device: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("kelix_rt.denoise_graphs.to_device", no_memory)
        with pytest.raises(RuntimeError, match="no memory"):
            denoiser.step([second])
    for _ in range(STEPS - 1):
        denoiser.step([first])
    torch.testing.assert_close(first.latent, draw(eager, (9,))[0], atol=2e-5, rtol=1e-5)


def test_what_does_not_fit_is_eager_and_counted(dit: KelixDiT) -> None:
    eager, (denoiser, counts) = make(dit, None)[0], make(dit)
    patch = dit.config.patch_size
    for lengths, options in [((3,) * (DENOISE_ROWS + 1), {}), ((3,), {"smaller": patch})]:
        before = counts.misses
        pairs = zip(
            draw(eager, lengths, **options), draw(denoiser, lengths, **options), strict=True
        )
        for expected, got in pairs:
            torch.testing.assert_close(got, expected)
        assert counts.misses == before + STEPS
    assert counts.replays == 0


def test_a_condition_that_was_not_finite_leaves_nothing_behind(golden: Path) -> None:
    """A longer condition of NaN, then a shorter one: its padding holds no NaN of the other."""
    dit = KelixDiT.from_pretrained(golden / "dit" / "tiny_release")
    denoiser, _ = make(dit)
    state = start(denoiser, CAPACITY)
    for values in state.condition.values:
        values.fill_(torch.nan)
    denoiser.step([state])
    (latent,) = draw(denoiser, (3,))
    assert bool(latent.isfinite().all())


def test_tables_outlive_the_cache_of_the_model(golden: Path) -> None:
    """A graph reads the position table by address; drawings of other sizes push it out."""
    dit = KelixDiT.from_pretrained(golden / "dit" / "tiny_alt")
    graphs = DenoiseGraphs(dit, CAPACITY, GraphCounts())
    graphs.capture(record)
    assert graphs._inputs is not None
    added, rotary = graphs._inputs.tables
    assert added is not None
    assert rotary is not None
    sincos_table.cache_clear()
    image_rotary.cache_clear()
    for rows in range(1, DENOISE_ROWS + 1):
        recording = graphs._steps[rows]._replay
        assert isinstance(recording, Recording)
        assert recording.reads(added)
        assert recording.reads(rotary[0])


def engine_with_drawing(golden: Path, **options: Any) -> Engine:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    return load_engine(golden / "llm" / "tiny_a", **parts, **options)


def test_the_engine_draws_the_same_picture(golden: Path) -> None:
    render = RenderParams(steps=STEPS, seed=3, cfg=2.0)
    eager, engine = (engine_with_drawing(golden) for _ in range(2))
    graphs = engine.runner.denoise_graphs
    assert graphs is not None
    graphs.capture(record)
    one, two = (e.generate_image([5, 6], render=render).image for e in (eager, engine))
    assert np.abs(np.asarray(one).astype(int) - np.asarray(two)).max() <= 1
    assert engine.stats().graph_replays == STEPS
    engine.runner.offload().restore()
    assert not graphs.is_captured
    engine.generate_image([5, 6], render=render)
    assert engine.stats().graph_replays == STEPS, "forgotten with the memory it read"
