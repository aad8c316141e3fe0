"""Steps launched ahead on a real GPU against steps that wait, with CUDA graphs and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kelix_rt import Engine, SamplingParams
from kelix_rt.assets import BUNDLED
from tests.gpu.test_graphs import DEVICE, SEEDED, pytestmark, run_mixed

__all__ = ["pytestmark"]
MANY = replace(SEEDED, max_blocks=40, ignore_eos=True)


def load(path: str | Path, overlap: bool, **options: object) -> Engine:
    return Engine.from_pretrained(
        path, device=DEVICE, dtype="float32", overlap=overlap, max_batch=8, **options
    )


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["tiny_a", "tiny_b", BUNDLED])
def test_blocks_are_the_same_with_overlap_and_without(
    golden: Path, name: str, graphs: bool
) -> None:
    """Answers and drawings at once, then requests that take each other's pages."""
    path = name if name == BUNDLED else golden / "llm" / name
    ahead, waiting = (load(path, overlap, cuda_graphs=graphs) for overlap in (True, False))
    for _ in range(2):  # the second time on cached prefixes
        for one, two in zip(run_mixed(ahead), run_mixed(waiting), strict=True):
            np.testing.assert_array_equal(one, two)
    assert ahead.stats().steps_ahead > 0
    assert waiting.stats().steps_ahead == 0
    short = load(path, True, cuda_graphs=graphs, page_size=16, num_pages=12, prefix_cache=False)
    prompts = [[number, 7, 9] for number in range(8)]
    pairs = zip(short.generate(prompts, MANY), waiting.generate(prompts, MANY), strict=True)
    for one, two in pairs:
        np.testing.assert_array_equal(one.blocks, two.blocks)


def test_a_launch_does_not_wait_for_the_step_in_front(golden: Path) -> None:
    """Torch refuses to wait while a step is planned, packed and launched behind another one."""
    engine = load(golden / "llm" / "tiny_a", True)
    for prompt in ([1, 2], [3]):
        engine.add_request(prompt, SamplingParams(0.0, max_blocks=20, ignore_eos=True))
    engine.step()
    engine.step()
    flight = engine._flight
    assert flight is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = engine.scheduler.schedule_ahead(flight.plan)
        assert plan is not None
        behind = engine.runner.blocks.launch(plan, flight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(engine.runner.blocks.read(behind)) == 2
