"""Steps launched before the blocks in front are read: nothing but the order of work changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kelix_rt import BlockEvent, Engine, Prompt, RenderParams, RequestDone, SamplingParams
from kelix_rt.assets import BUNDLED
from kelix_rt.sequence import Sequence
from tests.engine_helpers import (
    GREEDY,
    assert_idle,
    fixtures,
    golden_blocks,
    golden_prompt,
    golden_runs,
    golden_sampling,
    load_engine,
)
from tests.graph_tape import record
from tests.queues import LateMark, LateQueue, Load, ThreadQueue, as_on_a_gpu
from tests.test_engine_speculation import Oracle

SEEDED = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=5, max_blocks=9)
FILTERED = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=6, max_blocks=7)
REFERENCE = SamplingParams(temperature=0.9, top_k=4, seed=7, max_blocks=5, rule="reference")
KINDS = [GREEDY, SEEDED, FILTERED, REFERENCE]
OPTIONS = (
    {},
    {"max_step_tokens": 3, "page_size": 4},
    {"max_step_tokens": 5, "prefix_cache": False},
    {"max_step_tokens": 7, "page_size": 8, "num_pages": 9},
)


def recorded(engine: Engine, queue: LateQueue) -> Engine:
    """The same engine with recorded decode steps."""

    def after_the_upload(work: Callable[[], None]) -> Any:
        queue.mark().wait()
        return record(work)

    engine.runner.graphs.capture(after_the_upload)
    return engine


def requests_of(path: Path) -> list[tuple[Any, SamplingParams]]:
    prompts = [Prompt(*golden_prompt(path, run)) for run in golden_runs(path)]
    prompts += [[1, 2, 3], [4], [5, 6], list(range(20, 40))]
    return [(prompt, KINDS[i % len(KINDS)]) for i, prompt in enumerate(prompts)]


def serve(engine: Engine, requests: list[tuple[Any, SamplingParams]], **options: Any) -> list[Any]:
    numbers = [engine.add_request(prompt, one, **options) for prompt, one in requests]
    outputs = [event.output for event in engine.run_to_end(numbers)]
    assert_idle(engine)
    assert engine._flight is None
    return outputs


def assert_equal(outputs: list[Any], expected: list[Any]) -> None:
    for one, two in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(one.blocks, two.blocks)
        assert one.finish_reason == two.finish_reason
        if two.hidden is not None:
            torch.testing.assert_close(one.hidden, two.hidden, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_golden_blocks(golden: Path, load: Load, name: str, options: dict) -> None:
    path = golden / "llm" / name
    engine, _ = load(path, **options)
    for _ in range(2):  # the second time on cached prefixes
        for run in golden_runs(path):
            output = engine.generate_blocks(*golden_prompt(path, run), golden_sampling(path))
            assert torch.equal(output.ids, fixtures(path)[f"{run}/ids"])
    assert_idle(engine)
    counts = engine.stats()
    assert counts.steps_ahead > counts.block_steps / 2


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mixed_requests(golden: Path, load: Load, name: str, options: dict, graphs: bool) -> None:
    """All rules of sampling and lengths together; what is kept of hidden states, too."""
    path = golden / "llm" / name
    plain = load_engine(path, **options)
    expected = serve(plain, requests_of(path), return_hidden=True)
    engine, queue = load(path, **options)
    if graphs:
        recorded(engine, queue)
    assert_equal(serve(engine, requests_of(path), return_hidden=True), expected)
    assert_equal(serve(engine, requests_of(path)), serve(plain, requests_of(path)))
    counts = engine.stats()
    assert counts.steps_ahead > 0
    assert (counts.graph_replays > 0) == graphs
    assert counts.blocks == plain.stats().blocks


@pytest.mark.parametrize("steps", range(0, 12))
def test_an_abort_while_a_step_is_under_way(golden: Path, load: Load, steps: int) -> None:
    path = golden / "llm" / "tiny_a"
    engine, _ = load(path, page_size=4)
    expected = golden_blocks(path, "gen0")
    numbers = [
        engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path)) for _ in range(3)
    ]
    for _ in range(steps):
        engine.step()
    output = engine.abort(numbers[1])
    assert len(output.blocks) == steps, "a step that is under way is not counted"
    np.testing.assert_array_equal(output.blocks, expected[:steps])
    late = engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path))
    for event in engine.run_to_end([numbers[0], numbers[2], late]):
        np.testing.assert_array_equal(event.output.blocks, expected)
    engine.step()
    assert_idle(engine)


def test_aborting_all_forgets_the_step_under_way(golden: Path, load: Load) -> None:
    path = golden / "llm" / "tiny_a"
    engine, queue = load(path)
    numbers = [engine.add_request(p, golden_sampling(path)) for p in ([1, 2], [3])]
    engine.step()
    assert engine._flight is not None
    for number in numbers:
        engine.abort(number)
    assert engine._flight is None
    engine.step()  # hands out the last events
    assert_idle(engine)
    assert queue.done < queue.taken, "nobody waited for it"
    assert engine.stats().blocks_dropped == 2
    engine.sleep()
    engine.wake()
    output = engine.generate([golden_prompt(path, "gen0")[0]], golden_sampling(path))[0]
    np.testing.assert_array_equal(output.blocks, golden_blocks(path, "gen0"))


def test_page_shortage(golden: Path, load: Load) -> None:
    path = golden / "llm" / "tiny_a"
    requests = [([n, n + 1, n + 2], replace(SEEDED, seed=n)) for n in range(1, 9)]
    options = {"page_size": 4, "prefix_cache": False}
    engine, _ = load(path, **options, num_pages=7)
    outputs = serve(engine, requests, return_hidden=True)
    assert sum(output.usage.preemptions for output in outputs) >= 2
    assert engine.stats().steps_ahead > 0
    assert_equal(outputs, serve(load_engine(path, **options), requests, return_hidden=True))


@pytest.mark.parametrize("place", [1, 2, 3, 9])
def test_a_stop_id_drops_the_row_behind_it(golden: Path, load: Load, place: int) -> None:
    path = golden / "llm" / "tiny_a"
    expected = golden_blocks(path, "gen0")
    stop = int(expected[place, 0])
    count = 1 + next(i for i in range(1, len(expected)) if expected[i, 0] == stop)
    engine, _ = load(path, page_size=4)
    prompt = Prompt(*golden_prompt(path, "gen0"))
    sampling = SamplingParams(temperature=0.0, stop_ids=(stop,), max_blocks=49)
    (output,) = serve(engine, [(prompt, sampling)], return_hidden=True)
    np.testing.assert_array_equal(output.blocks, expected[:count])
    assert output.finish_reason == "stop"
    assert len(output.hidden) == len(golden_prompt(path, "gen0")[0]) + count - 1
    assert engine.stats().blocks_dropped == 1
    # What was computed behind the end is not shared: pages hold rows up to the one in front of it.
    rows = np.concatenate((engine.runner.model.expand(torch.as_tensor(prompt.ids)), expected))
    assert engine.scheduler.pool.match_prefix(rows)[1] <= len(prompt.ids) + count - 1


class Knowing(Oracle):
    """Drafts in every other place, and says so."""

    def propose(self, sequence: Sequence) -> np.ndarray | None:
        return super().propose(sequence) if sequence.generated % 10 == 4 else None

    def expects(self, sequence: Sequence) -> bool:
        return sequence.generated % 10 == 3


def test_drafts_go_on(golden: Path, load: Load) -> None:
    path = golden / "llm" / "tiny_a"
    requests = [(Prompt(*golden_prompt(path, run)), SEEDED) for run in golden_runs(path)] * 2
    requests = [(p, replace(s, max_blocks=30, ignore_eos=True)) for p, s in requests]
    expected = serve(load_engine(path), requests, return_hidden=True)
    engine, _ = load(path, page_size=4)
    engine.scheduler.drafter = Knowing({i: o.blocks for i, o in enumerate(expected)})
    assert_equal(serve(engine, requests, return_hidden=True), expected)
    counts = engine.stats()
    assert counts.drafts_accepted > 0 and counts.drafts_rejected > 0 and counts.steps_ahead > 0


def test_markers_are_guessed_as_often(load: Load) -> None:
    sampling = SamplingParams(temperature=0.7, top_k=0, top_p=1.0, max_blocks=110, seed=40)
    plain = load_engine(BUNDLED, dtype="float32")
    engine, _ = load(BUNDLED, dtype="float32")
    for texts in (["a red circle."], ["two blue squares.", "a green star."]):
        requests = [(plain.drawing_prompt(f"draw {text}"), sampling) for text in texts]
        assert_equal(serve(engine, requests), serve(plain, requests))
    counts, before = engine.stats(), plain.stats()
    assert counts.drafts_accepted == before.drafts_accepted > 0
    assert counts.drafts_rejected == before.drafts_rejected
    assert counts.block_steps <= before.block_steps + 3  # steps of ended requests alone
    assert counts.steps_ahead > counts.block_steps / 2


def test_drawings_and_answers(golden: Path, load: Load) -> None:
    """The image's end is fed while the host does not know yet that it is the end."""
    path = golden / "llm" / "tiny_a"
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    prompt, render = fixtures(path)["cond/prompt_ids2d"], RenderParams(steps=3, seed=3)
    results = []
    for engine in (load_engine(path, **parts), load(path, **parts)[0]):
        numbers = [
            engine.add_request(prompt, SamplingParams(0.0, max_blocks=60), render=render),
            engine.add_request([5, 6], SEEDED),
            engine.add_request([7], SEEDED, render=replace(render, steps=2)),
        ]
        results.append([event.output for event in engine.run_to_end(numbers)])
        assert_idle(engine)
    assert engine.stats().steps_ahead > 0
    assert_equal(results[1], results[0])
    for one, two in zip(*results, strict=True):
        if one.image is not None:
            assert one.image.condition_length == two.image.condition_length
            assert np.array_equal(np.asarray(one.image.image), np.asarray(two.image.image))
    assert results[0][0].finish_reason == "stop", "closed by the model, not by the limit"


def test_the_host_hands_blocks_out_while_the_next_step_is_under_way(
    golden: Path, load: Load
) -> None:
    engine, queue = load(golden / "llm" / "tiny_a")
    engine.add_request([1, 2], replace(SEEDED, max_blocks=6))
    under_way = []
    for _ in range(6):
        events = engine.step()
        assert isinstance(events[0], BlockEvent)
        under_way.append((engine._flight is not None, queue.taken > queue.done))
    assert under_way == [(True, True)] * 5 + [(False, False)]
    assert isinstance(events[-1], RequestDone)


def test_who_does_not_wait_gets_nothing(
    golden: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in shows what it is for: without the wait there are no blocks to read."""
    path = golden / "llm" / "tiny_a"
    engine, _ = load(path)
    monkeypatch.setattr(LateMark, "wait", lambda self: None)
    output = engine.generate([golden_prompt(path, "gen0")[0]], golden_sampling(path))[0]
    assert not np.array_equal(output.blocks, golden_blocks(path, "gen0"))


def test_a_thread_that_computes_while_the_host_goes_on(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = golden / "llm" / "tiny_a"
    expected = serve(load_engine(path, page_size=4), requests_of(path) * 3, return_hidden=True)
    queue = ThreadQueue()
    as_on_a_gpu(monkeypatch, queue)
    engine = load_engine(path, page_size=4)
    try:
        assert_equal(serve(engine, requests_of(path) * 3, return_hidden=True), expected)
    finally:
        queue.close()
    assert engine.stats().steps_ahead > 0
