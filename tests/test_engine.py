"""The engine on golden checkpoints: paging, chunks, batches and preemption change nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kelix_rt import (
    BlockEvent,
    Engine,
    InputError,
    KelixError,
    Prompt,
    RequestDone,
    SamplingParams,
    SlotSampling,
)
from tests.engine_helpers import (
    assert_idle,
    fixtures,
    golden_blocks,
    golden_prompt,
    golden_runs,
    golden_sampling,
    load_engine,
)

MODELS = ("tiny_a", "tiny_b")
OPTIONS = (
    {},
    {"max_step_tokens": 3, "page_size": 4},
    {"max_step_tokens": 5, "prefix_cache": False},
    {"max_step_tokens": 7, "page_size": 8, "num_pages": 9},
)
SAMPLED = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=1234, max_blocks=12)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / "llm" / request.param


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_blocks_equal_the_golden_ones(model: Path, options: dict) -> None:
    engine = load_engine(model, **options)
    for _ in range(2):  # the second time on cached prefixes
        for run in golden_runs(model):
            output = engine.generate_blocks(*golden_prompt(model, run), golden_sampling(model))
            assert torch.equal(output.ids, fixtures(model)[f"{run}/ids"])
            assert output.hidden is None
    assert_idle(engine)


@pytest.mark.parametrize("max_step_tokens", [3, 512])
def test_hidden_states_equal_the_golden_ones(model: Path, max_step_tokens: int) -> None:
    engine = load_engine(model, max_step_tokens=max_step_tokens, page_size=4)
    checked = 0
    for _ in range(2):  # cached prefixes must not cost rows
        for run in golden_runs(model):
            expected = fixtures(model).get(f"{run}/last_hidden")
            if expected is None:
                continue
            prompt = golden_prompt(model, run)
            output = engine.generate_blocks(*prompt, golden_sampling(model), return_hidden=True)
            torch.testing.assert_close(output.hidden, expected, atol=3e-5, rtol=0)
            checked += 1
    assert checked
    assert_idle(engine)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_of_mixed_prompts_gives_the_golden_blocks(model: Path, options: dict) -> None:
    engine = load_engine(model, **options | {"max_batch": 6})
    runs = golden_runs(model) * 3
    prompts = [Prompt(*golden_prompt(model, run)) for run in runs]
    outputs = engine.generate(prompts, golden_sampling(model))
    for run, output in zip(runs, outputs, strict=True):
        assert output.error is None
        np.testing.assert_array_equal(output.blocks, golden_blocks(model, run))
        assert output.usage.generated_blocks == len(output.blocks)
        assert output.finish_reason == ("stop" if len(output.blocks) < 49 else "length")
    assert_idle(engine)


def test_preemption_half_way_changes_nothing(model: Path) -> None:
    runs = golden_runs(model)
    engine = load_engine(model, num_pages=9, page_size=8, prefix_cache=False, max_step_tokens=16)
    numbers = [
        engine.add_request(
            Prompt(*golden_prompt(model, run)), golden_sampling(model), return_hidden=True
        )
        for run in runs
    ]
    events = engine.run_to_end(numbers)
    assert sum(event.output.usage.preemptions for event in events) > 0
    for run, event in zip(runs, events, strict=True):
        np.testing.assert_array_equal(event.output.blocks, golden_blocks(model, run))
        expected = fixtures(model).get(f"{run}/last_hidden")
        if expected is not None:
            torch.testing.assert_close(event.output.hidden, expected, atol=3e-5, rtol=0)
    assert_idle(engine)


def test_the_budget_is_exact(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    data = fixtures(path)
    count = len(data["budget/ids"]) - len(data["budget/prompt_ids2d"])
    sampling = SamplingParams(temperature=0.0, max_blocks=count)
    output = load_engine(path).generate_blocks(data["budget/prompt_ids2d"], sampling=sampling)
    assert torch.equal(output.ids, data["budget/ids"])


def prompts_of_many(vocab: int, count: int) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(1, vocab // 3, generator.integers(1, 24)).tolist()
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("rule", ["ancestral", "reference"])
def test_same_seed_same_blocks_in_any_company(model: Path, rule: str) -> None:
    """Alone, with 31 others, in reverse order, and preempted under page pressure."""
    engine = load_engine(model)
    vocab = engine.config.qwen_config.vocab_size
    prompts = prompts_of_many(vocab, 32)
    samplings = [
        SamplingParams(1.0, 0, 1.0, seed=100 + i, max_blocks=10, ignore_eos=True, rule=rule)
        for i in range(32)
    ]
    alone = {i: engine.generate([prompts[i]], samplings[i])[0].blocks for i in (0, 5, 17, 31)}
    tight = {"num_pages": 24, "page_size": 4, "max_step_tokens": 33, "prefix_cache": False}
    preempted = 0
    for options, order in (({}, range(32)), ({}, range(31, -1, -1)), (tight, range(32))):
        crowd = load_engine(model, **options)
        numbers = {i: crowd.add_request(prompts[i], samplings[i]) for i in order}
        events = crowd.run_to_end(list(numbers.values()))
        for i, event in zip(numbers, events, strict=True):
            preempted += event.output.usage.preemptions
            if i in alone:
                np.testing.assert_array_equal(event.output.blocks, alone[i])
        assert_idle(crowd)
    assert preempted > 0


def test_seeds_decide_the_blocks(model: Path) -> None:
    engine = load_engine(model)
    prompt = [[5, 6, 7]]
    first, again, other = (
        engine.generate(prompt, SamplingParams(1.0, 0, 1.0, seed=seed, max_blocks=9))[0].blocks
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_a_seed_requests_differ_and_engines_repeat(model: Path) -> None:
    sampling = SamplingParams(1.0, 0, 1.0, max_blocks=8, ignore_eos=True)
    engines = [load_engine(model, seed=seed) for seed in (3, 3, 4)]
    outputs = [[o.blocks for o in e.generate([[5, 6]] * 2, sampling)] for e in engines]
    assert not np.array_equal(outputs[0][0], outputs[0][1])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0][0], outputs[2][0])


def test_visual_slots_have_their_own_sampling(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    greedy_codes = SamplingParams(
        1.0, 1, 1.0, seed=1, max_blocks=20, visual=SlotSampling(temperature=0.0)
    )
    blocks = engine.generate([Prompt(*golden_prompt(path, "gen0"))], greedy_codes)[0].blocks
    np.testing.assert_array_equal(blocks, golden_blocks(path, "gen0")[:20])


def test_stop_ids_end_a_request_but_not_in_the_first_block(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    prompt = Prompt(*golden_prompt(path, "gen0"))
    blocks = golden_blocks(path, "gen0")
    third = int(blocks[2, 0])
    for stops, count in (((int(blocks[0, 0]),), len(blocks)), ((third,), 3)):
        sampling = SamplingParams(temperature=0.0, stop_ids=list(stops), max_blocks=49)  # type: ignore[arg-type]
        output = engine.generate([prompt], sampling)[0]
        repeated = [i for i, first in enumerate(blocks[:, 0]) if i and first in stops]
        assert len(output.blocks) == (repeated[0] + 1 if repeated else count)
        assert output.finish_reason == "stop"


def test_equal_prompts_are_computed_once(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path, page_size=4)
    prompt = Prompt(*golden_prompt(path, "gen2"))
    first, second = (engine.generate([prompt], SAMPLED)[0] for _ in range(2))
    assert first.usage.cached_blocks == 0
    assert second.usage.cached_blocks == 16
    np.testing.assert_array_equal(first.blocks, second.blocks)


def test_images_with_equal_placeholders_do_not_share_pages(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path, page_size=4)
    ids, images = golden_prompt(path, "gen2")
    other = images.roll(1, dims=0)
    alone = load_engine(path).generate([Prompt(ids, other)], SAMPLED)[0]
    engine.generate([Prompt(ids, images)], SAMPLED)
    after = engine.generate([Prompt(ids, other)], SAMPLED)[0]
    np.testing.assert_array_equal(after.blocks, alone.blocks)


def test_whole_rows_are_a_prompt(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    ids, images = golden_prompt(path, "gen2")
    rows = engine.runner.model.expand(ids, images)
    output = engine.generate_blocks(rows, sampling=golden_sampling(path))
    assert torch.equal(output.ids[: len(ids)], rows)
    np.testing.assert_array_equal(output.ids[len(ids) :], golden_blocks(path, "gen2"))


def test_abort_at_any_step_frees_everything(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path, max_step_tokens=5, page_size=4)
    expected = golden_blocks(path, "gen0")
    for steps in (0, 1, 2, 4, 7, 11):
        kept = engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path))
        dropped = engine.add_request(golden_prompt(path, "gen1")[0], golden_sampling(path))
        for _ in range(steps):
            engine.step()
        output = engine.abort(dropped)
        assert output.finish_reason == "abort"
        assert engine.abort(dropped) is None
        (event,) = engine.run_to_end([kept])
        np.testing.assert_array_equal(event.output.blocks, expected)
        engine.step()
        assert_idle(engine)


def test_stream_gives_every_block_then_the_end(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    events = list(engine.stream(Prompt(*golden_prompt(path, "gen0")), golden_sampling(path)))
    blocks = [event for event in events if isinstance(event, BlockEvent)]
    assert [event.index for event in blocks] == list(range(len(blocks)))
    np.testing.assert_array_equal([e.ids for e in blocks], golden_blocks(path, "gen0"))
    assert isinstance(events[-1], RequestDone)
    assert_idle(engine)


def test_leaving_a_stream_aborts_its_request_only(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    left = engine.stream(golden_prompt(path, "gen1")[0], golden_sampling(path))
    stayed = engine.stream(golden_prompt(path, "gen0")[0], golden_sampling(path))
    next(left)
    first = next(stayed)
    left.close()
    rest = list(stayed)
    blocks = [e.ids for e in (first, *rest) if isinstance(e, BlockEvent)]
    np.testing.assert_array_equal(blocks, golden_blocks(path, "gen0"))
    assert_idle(engine)
    assert engine.step() == []  # nobody waits for the events of the stream that was left


def test_a_refused_prompt_leaves_no_events_of_those_before_it(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a")
    with pytest.raises(InputError):
        engine.generate([[1, 2], []])
    assert_idle(engine)
    assert engine.step() == []


def test_events_that_wait_are_given_to_who_asks_for_them(golden: Path) -> None:
    """Steps that other calls ran may have ended a request, or brought it half way."""
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    ended, half = (
        engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path)) for _ in range(2)
    )
    engine.run_to_end([ended])
    later = engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path))
    for number in (half, later):
        events = list(engine.collect(number))
        blocks = [event.ids for event in events if isinstance(event, BlockEvent)]
        np.testing.assert_array_equal(blocks, golden_blocks(path, "gen0"))
        assert isinstance(events[-1], RequestDone)
    assert engine.step() == []
    assert_idle(engine)


@contextmanager
def held_inside(engine: Engine, monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[None]:
    """Another thread is inside a step of the engine, whose request must come out right."""
    inside, told = threading.Event(), threading.Event()
    launch = engine.runner.blocks.launch

    def slow(*args: Any) -> Any:
        inside.set()
        assert told.wait(60)
        return launch(*args)

    monkeypatch.setattr(engine.runner.blocks, "launch", slow)
    prompt, sampling = golden_prompt(path, "gen0")[0], golden_sampling(path)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(engine.generate, [prompt], sampling)
        assert inside.wait(60)
        try:
            yield
        finally:
            told.set()
        (output,) = first.result(60)
    np.testing.assert_array_equal(output.blocks, golden_blocks(path, "gen0"))


def test_a_second_thread_is_told_and_harms_nobody(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    prompt, sampling = golden_prompt(path, "gen0")[0], golden_sampling(path)
    with held_inside(engine, monkeypatch, path):
        for call in (lambda: engine.generate([prompt], sampling), lambda: engine.abort(0)):
            with pytest.raises(KelixError, match="not thread-safe, and another thread is inside"):
                call()
    assert_idle(engine)
    assert engine._mail == {}


def test_a_call_that_is_not_let_in_leaves_no_request_behind(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    left = engine.stream(golden_prompt(path, "gen0")[0], golden_sampling(path))
    next(left)
    with (
        held_inside(engine, monkeypatch, path),
        pytest.raises(KelixError, match="another thread is inside"),
    ):
        next(left)
    assert engine.step() == []
    assert_idle(engine)
    assert engine._mail == {}


def test_embedders_do_not_lose_events_to_other_calls(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path)
    own = engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path))
    engine.generate_blocks(golden_prompt(path, "gen1")[0], sampling=golden_sampling(path))
    events = []
    while engine.has_work:
        events += engine.step()
    assert isinstance(events[-1], RequestDone)
    assert {event.request_id for event in events} == {own}
    blocks = [event.ids for event in events if isinstance(event, BlockEvent)]
    np.testing.assert_array_equal(blocks, golden_blocks(path, "gen0"))
