"""What the host does between two steps, and how much of it a device has to wait for.

Without a GPU the device is a thread (`tests/queues.py`): it computes what it is given in order and
counts how often it has nothing to do. Everything else is the engine as it serves. On a GPU the time
of a step is compared instead.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.compare import Comparison, Machine
from kelix_rt import BlockEvent, Engine, SamplingParams
from kelix_rt.assets import BUNDLED
from tests.queues import ThreadQueue, as_on_a_gpu

STEPS, TURNS = 40, 3
BLOCKS = 2 + TURNS * (STEPS + 2) + 2


def crowd(engine: Engine, batch: int) -> list[int]:
    """Sampled requests that nothing ends before the last step."""
    numbers = []
    for i in range(batch):
        sampling = SamplingParams(1.0, 0, 1.0, seed=i, max_blocks=BLOCKS, ignore_eos=True)
        numbers.append(engine.add_request([5 + i, 6, 7], sampling))
    for _ in range(2):
        engine.step()
    return numbers


def run_steps(engine: Engine) -> tuple[float, float, list[tuple[int, ...]]]:
    """Seconds of a step on the clock and of the loop's own thread, and the blocks."""
    begin, cpu, blocks = time.perf_counter(), time.thread_time(), []
    for _ in range(STEPS):
        blocks += [event.ids for event in engine.step() if isinstance(event, BlockEvent)]
    return (time.perf_counter() - begin) / STEPS, (time.thread_time() - cpu) / STEPS, blocks


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("model", ["kelix-tiny", "mid_size"])
def test_device_without_work(
    compare: Comparison,
    machine: Machine,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    batch: int,
) -> None:
    """The same requests with and without overlap, in turns; the best turn of each counts."""
    path: str | Path = BUNDLED if model == "kelix-tiny" else request.getfixturevalue("mid_size")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the device's; the other core is the host's
    engines: dict[str, tuple[Engine, ThreadQueue | None]] = {}
    try:
        for name, overlap in (("off", False), ("on", True)):
            queue = None if machine.on_gpu else ThreadQueue()
            with monkeypatch.context() as patch:
                if queue is not None:
                    as_on_a_gpu(patch, queue)
                engine = Engine.from_pretrained(
                    path, device=machine.device, overlap=overlap, max_model_len=512,
                    speculate_markers=False, num_pages=1024,
                )  # fmt: skip
            crowd(engine, batch)
            engines[name] = engine, queue
        facts: dict[str, float] = {}
        seen: dict[str, list[object]] = {"off": [], "on": []}
        for _ in range(TURNS):
            for name, (engine, queue) in engines.items():
                for _ in range(2):  # the device's last ones of the turn before are long done
                    seen[name] += [e.ids for e in engine.step() if isinstance(e, BlockEvent)]
                before = 0 if queue is None else queue.starved
                step, host, blocks = run_steps(engine)
                seen[name] += blocks
                found = {"step_ms": step * 1e3, "host_us": host * 1e6}
                if queue is not None:
                    found["starved"] = (queue.starved - before) / STEPS
                for key, value in found.items():
                    best = min(facts.get(f"{name}_{key}", np.inf), value)
                    facts[f"{name}_{key}"] = round(best, 2)
        assert seen["off"] == seen["on"], "overlap changed a block"
        assert engines["on"][0].stats().steps_ahead >= TURNS * STEPS
    finally:
        torch.set_num_threads(threads)
        for _, queue in engines.values():
            if queue is not None:
                queue.close()
    compare.benchmark.pedantic(lambda: None, rounds=1)
    compare.record({**facts, "ratio": round(facts["off_step_ms"] / facts["on_step_ms"], 2)})
    if not machine.on_gpu:
        assert facts["off_starved"] >= 0.9, "the device waits for the host in every step"
        # The thread shares Python's lock with the host, so it comes late now and then.
        assert facts["on_starved"] <= 0.75
