"""Real CUDA graphs against steps that are launched kernel by kernel, over the whole engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kelix_rt import Engine, RenderParams, RequestDone, SamplingParams
from kelix_rt.assets import BUNDLED
from kelix_rt.denoise_graphs import DenoiseGraphs
from kelix_rt.graphs import CudaRecorder, GraphCounts
from kelix_rt.models.dit import KelixDiT
from kelix_rt.stages.denoise import Denoiser

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
DEVICE = "cuda"
SEEDED = SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01, seed=5, max_blocks=9)
PROMPTS = ([5, 6, 7], [9], [11, 12], [13, 14, 15, 16], [17], [18])
RENDER = RenderParams(steps=4, seed=4)
STEPS, CAPACITY = 4, 12


def load(path: str | Path, golden: Path, graphs: bool) -> Engine:
    """In float32, where near ties do not decide; with the DiT of the tests where it fits."""
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    own = parts if path == golden / "llm" / "tiny_a" else {}
    return Engine.from_pretrained(
        path, device=DEVICE, dtype="float32", cuda_graphs=graphs, max_batch=8, **own
    )


def run_mixed(engine: Engine) -> list[np.ndarray]:
    """Blocks of answers and drawings that run at once, so that all graphs take turns."""
    numbers = [engine.add_request(prompt, SEEDED) for prompt in PROMPTS]
    if engine.runner.render is not None:
        numbers += [engine.add_request([number], render=RENDER) for number in (3, 4)]
    done: dict[int, Any] = {}
    while engine.has_work:
        events = engine.step()
        done |= {e.request_id: e.output for e in events if isinstance(e, RequestDone)}
    return [done[number].blocks for number in numbers]


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b", BUNDLED])
def test_blocks_are_the_same_with_graphs_and_without(golden: Path, name: str) -> None:
    path = name if name == BUNDLED else golden / "llm" / name
    with_graphs, without = load(path, golden, True), load(path, golden, False)
    for _ in range(2):  # the second time on cached prefixes
        for one, two in zip(run_mixed(with_graphs), run_mixed(without), strict=True):
            np.testing.assert_array_equal(one, two)
    assert with_graphs.stats().graph_replays > 0
    counts = without.stats()
    assert (counts.graph_replays, counts.graph_misses) == (0, 0)


def test_sleep_gives_the_memory_of_graphs_back_and_wake_takes_it(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load(path, golden, True)
    expected = run_mixed(engine)
    engine.sleep("host")
    engine.wake()
    before = engine.stats().graph_replays
    for one, two in zip(run_mixed(engine), expected, strict=True):
        np.testing.assert_array_equal(one, two)
    assert engine.stats().graph_replays > before


@pytest.mark.parametrize("options", [{}, {"cfg": 3.0}, {"scheduler": "dpm++"}], ids=str)
@pytest.mark.parametrize("name", ["tiny_release", "tiny_alt"])
def test_denoise_graphs_give_the_latents_of_eager_steps(
    golden: Path, name: str, options: dict[str, Any]
) -> None:
    dit = KelixDiT.from_pretrained(golden / "dit" / name, DEVICE)
    counts, latents = GraphCounts(), []
    for recorded in (False, True):
        denoiser = Denoiser(dit)
        if recorded:
            graphs = DenoiseGraphs(dit, CAPACITY, counts)
            graphs.capture(CudaRecorder(torch.device(DEVICE)))
            denoiser.evaluate = graphs.evaluate
        for length in (9, 4):
            generator = torch.Generator().manual_seed(length)
            side = dit.config.input_size
            latent = torch.randn(1, dit.config.in_channels, side, side, generator=generator)
            condition = torch.randn(1, length, dit.condition_channels, generator=generator)
            cache = dit.prepare_condition(condition.to(DEVICE), capacity=CAPACITY)
            state = denoiser.start(cache, latent, STEPS, **options)
            for _ in range(STEPS):
                denoiser.step([state])
            latents.append(state.latent.cpu())
    for eager, replayed in zip(latents[:2], latents[2:], strict=True):
        torch.testing.assert_close(replayed, eager, atol=1e-4, rtol=1e-4)
    assert (counts.replays, counts.misses) == (2 * STEPS, 0)
