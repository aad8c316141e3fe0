"""Failures while a step is under way, and where steps do not overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kelix_rt import BlockEvent, Engine, KelixError, RequestDone, RequestFailed, SamplingParams
from kelix_rt.config import EngineConfig
from kelix_rt.device_queue import InlineQueue
from tests.engine_helpers import (
    assert_idle,
    golden_blocks,
    golden_prompt,
    golden_sampling,
    load_engine,
)
from tests.queues import Load, as_on_a_gpu
from tests.test_engine_bad_input import poison

SEEDED = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=5, max_blocks=9, ignore_eos=True)


@pytest.fixture
def path(golden: Path) -> Path:
    return golden / "llm" / "tiny_a"


@pytest.fixture
def engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Overlaps over a device that raises where work is launched, as a GPU mostly does."""
    with monkeypatch.context() as patch:
        as_on_a_gpu(patch, InlineQueue())
        return load_engine(path)


def assert_serves(engine: Engine, path: Path) -> None:
    assert_idle(engine)
    assert engine._flight is None
    output = engine.generate([golden_prompt(path, "gen0")[0]], golden_sampling(path))[0]
    np.testing.assert_array_equal(output.blocks, golden_blocks(path, "gen0"))


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_launch_that_fails_costs_none_of_the_blocks_in_front(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    forward, calls = engine.runner.generate.step, []

    def failing(batch: object) -> object:
        calls.append(batch)
        if len(calls) > after:
            raise RuntimeError("the device fell over")
        return forward(batch)

    monkeypatch.setattr(engine.runner.generate, "step", failing)
    numbers = [engine.add_request(prompt, SEEDED) for prompt in ([1, 2, 3], [4, 5])]
    events = []
    while engine.has_work:
        events += engine.step()
    for number in numbers:
        own = [event for event in events if event.request_id == number]
        assert [type(event) for event in own] == [BlockEvent] * after + [RequestFailed]
        assert "fell over" in str(own[-1].error)
    monkeypatch.undo()
    assert_serves(engine, path)


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_interrupt_leaks_nothing(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    forward, calls = engine.runner.generate.step, []

    def interrupted(batch: object) -> object:
        calls.append(batch)
        if len(calls) > after:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(engine.runner.generate, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3], [4, 5]], SEEDED)
    monkeypatch.undo()
    assert_serves(engine, path)


def test_an_interrupt_while_reading_fails_the_step_and_leaks_nothing(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(flight: object) -> list:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner.blocks, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3], [4, 5]], SEEDED)
    monkeypatch.undo()
    assert_serves(engine, path)


def test_an_error_of_the_device_comes_with_the_read(path: Path, load: Load) -> None:
    """What was launched behind it is lost, too."""
    engine, queue = load(path)
    number = engine.add_request([1, 2], SEEDED)
    assert isinstance(engine.step()[0], BlockEvent)

    def broken() -> None:
        raise RuntimeError("an illegal memory access")

    queue.run(broken)
    (event,) = engine.run_to_end([number])
    assert isinstance(event, RequestFailed)
    assert "illegal memory access" in str(event.error)
    assert_idle(engine)
    assert engine._flight is None


def test_nan_logits_fail_their_request_alone(
    path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row of -1 goes on to the next step before the host has seen it."""
    engine, _ = load(path)
    poison(engine, monkeypatch, bad_seed=13)
    good = engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path))
    bad = engine.add_request([1, 2, 3], SamplingParams(seed=13))
    kept, failed = engine.run_to_end([good, bad])
    assert isinstance(failed, RequestFailed)
    assert isinstance(failed.error, KelixError)
    assert "logits of block 0 are not finite" in str(failed.error)
    assert isinstance(kept, RequestDone)
    np.testing.assert_array_equal(kept.output.blocks, golden_blocks(path, "gen0"))
    monkeypatch.undo()
    assert_serves(engine, path)


def test_overlap_is_for_gpus(path: Path, load: Load) -> None:
    """By default on, off on a CPU whatever is asked, and where dropped rows would be counted."""
    assert EngineConfig().on_device("cuda").overlap
    assert not EngineConfig(overlap=False).on_device("cuda").overlap
    plain = load_engine(path, overlap=True)
    assert not plain.options.overlap
    assert isinstance(plain.runner.blocks._queue, InlineQueue)
    for options, expected in (
        ({}, True),
        ({"overlap": False}, False),
        ({"verify_head": True}, False),
    ):
        engine, _ = load(path, **options)
        engine.generate([[1, 2]], SEEDED)
        assert (engine.stats().steps_ahead > 0) == expected
    plain.generate([[1, 2]], SEEDED)
    assert plain.stats().steps_ahead == 0
