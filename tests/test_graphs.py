"""Recorded decode steps: padded to a bucket and replayed, they give what an eager step gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kelix_rt import Engine, Prompt, RenderParams, RequestDone, SamplingParams
from kelix_rt.assets import BUNDLED
from kelix_rt.config import EngineConfig
from kelix_rt.request import Event
from kelix_rt.step_layout import buckets
from tests.engine_helpers import (
    GREEDY,
    assert_idle,
    golden_prompt,
    golden_runs,
    load_engine,
)
from tests.graph_tape import record

MODELS = ("tiny_a", "tiny_b", BUNDLED)
SEEDED = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=5, max_blocks=9)
FILTERED = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=6, max_blocks=7)
REFERENCE = SamplingParams(temperature=0.9, top_k=4, seed=7, max_blocks=5, rule="reference")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, golden: Path) -> str | Path:
    return BUNDLED if request.param == BUNDLED else golden / "llm" / request.param


def recorded(engine: Engine) -> Engine:
    """The same engine with its decode steps recorded."""
    engine.runner.graphs.capture(record)
    return engine


def prompts_of(model: str | Path) -> list[Any]:
    if model == BUNDLED:
        generator = np.random.default_rng(1)
        return [generator.integers(0, 200, size=n).tolist() for n in (3, 9, 1, 30, 17)]
    found = [Prompt(*golden_prompt(model, run)) for run in golden_runs(model)]
    return [*found, [1, 2, 3], [4], [5, 6]]


def run_all(
    engine: Engine, prompts: list[Any], sampling: list[SamplingParams], **options: Any
) -> list[Any]:
    """Outputs of requests that run together, in order."""
    numbers = [
        engine.add_request(prompt, one, **options)
        for prompt, one in zip(prompts, sampling, strict=True)
    ]
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    assert_idle(engine)
    done = {event.request_id: event.output for event in events if isinstance(event, RequestDone)}
    return [done[number] for number in numbers]


@pytest.mark.parametrize("max_batch", [1, 3, 6])
def test_replayed_steps_give_the_blocks_of_eager_ones(model: str | Path, max_batch: int) -> None:
    """Greedy, sampled and filtered requests of different lengths; buckets full and padded."""
    prompts = prompts_of(model)
    kinds = [GREEDY, SEEDED, FILTERED]
    sampling = [kinds[i % 3] for i in range(len(prompts))]
    options = {"max_batch": max_batch, "page_size": 4, "num_pages": 200}
    eager = run_all(load_engine(model, **options), prompts, sampling)
    engine = recorded(load_engine(model, **options))
    replayed = run_all(engine, prompts, sampling)
    for one, two in zip(eager, replayed, strict=True):
        np.testing.assert_array_equal(one.blocks, two.blocks)
        assert one.finish_reason == two.finish_reason
    assert len({output.blocks.tobytes() for output in eager}) == len(prompts)
    counts = engine.stats()
    assert counts.graph_replays > counts.graph_misses > 0
    assert counts.graph_replays + counts.graph_misses == counts.block_steps


def test_hidden_states_come_out_of_a_replay(model: str | Path) -> None:
    prompts = prompts_of(model)[:3]
    sampling = [GREEDY, SEEDED, FILTERED]
    options = {"max_batch": 4, "num_pages": 100}
    eager = run_all(load_engine(model, **options), prompts, sampling, return_hidden=True)
    engine = recorded(load_engine(model, **options))
    replayed = run_all(engine, prompts, sampling, return_hidden=True)
    assert engine.stats().graph_replays > 0
    for one, two in zip(eager, replayed, strict=True):
        torch.testing.assert_close(one.hidden, two.hidden)


def test_a_drawing_is_the_same(golden: Path) -> None:
    """Its blocks go through replays, the row that closes its image too, and it keeps states."""
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    path = golden / "llm" / "tiny_a"
    eager, engine = load_engine(path, **parts), recorded(load_engine(path, **parts))
    render = RenderParams(steps=3, seed=4)
    one, two = (e.generate_image([5, 6], render=render) for e in (eager, engine))
    np.testing.assert_array_equal(one.blocks, two.blocks)
    assert one.condition_length == two.condition_length
    difference = np.asarray(one.image).astype(int) - np.asarray(two.image)
    assert np.abs(difference).max() <= 1
    assert engine.stats().graph_replays >= len(one.blocks) - 1


def test_what_does_not_fit_runs_eagerly_for_that_step_only(golden: Path) -> None:
    """The release's rule is not recorded, nor is a prompt of several rows."""
    path = golden / "llm" / "tiny_a"
    prompts, sampling = [[1, 2], [3, 4]], [REFERENCE, SEEDED]
    eager = run_all(load_engine(path), prompts, sampling)
    engine = recorded(load_engine(path))
    replayed = run_all(engine, prompts, sampling)
    for one, two in zip(eager, replayed, strict=True):
        np.testing.assert_array_equal(one.blocks, two.blocks)
    counts = engine.stats()
    assert counts.graph_misses == REFERENCE.max_blocks
    assert counts.graph_replays == SEEDED.max_blocks - REFERENCE.max_blocks


def test_rows_of_padding_read_and_write_nothing(golden: Path) -> None:
    """The cache is all NaN: read anywhere it would show, written anywhere it would be gone."""
    engine = recorded(load_engine(golden / "llm" / "tiny_a", max_batch=4, num_pages=8))
    runner = engine.runner
    for cache in (runner.kv.k, runner.kv.v):
        cache.fill_(torch.nan)
    runner.buffer.pad(4)
    result = runner.graphs.replay(4)
    assert bool(runner.kv.k.isnan().all()) and bool(runner.kv.v.isnan().all())
    assert result.hidden is not None
    assert bool(result.hidden.isfinite().all())
    assert bool((result.blocks >= 0).all())


def test_a_replay_does_not_see_the_step_before(golden: Path) -> None:
    """Four requests, then one in the same bucket: what the others left in the buffer is gone."""
    path = golden / "llm" / "tiny_a"
    options = {"max_batch": 4, "num_pages": 100}
    engine = load_engine(path, **options)
    engine.runner.graphs.capture(record)
    for bucket in (1, 2):
        del engine.runner.graphs._steps[bucket]
    alone = load_engine(path, **options).generate([[4]], SEEDED)[0].blocks
    engine.generate([[1], [2], [3], [4]], SEEDED)
    np.testing.assert_array_equal(engine.generate([[4]], SEEDED)[0].blocks, alone)
    assert engine.stats().graph_misses == 0, "a prompt of one row is a decode step too"


def test_preempted_requests_are_replayed_to_the_same_blocks(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    prompts, sampling = [[1, 2, 3], [4, 5, 6], [7, 8, 9]], [SEEDED] * 3
    engine = recorded(load_engine(path, page_size=4, num_pages=5, prefix_cache=False))
    outputs = run_all(engine, prompts, sampling)
    assert sum(output.usage.preemptions for output in outputs) > 0
    for one, two in zip(run_all(load_engine(path), prompts, sampling), outputs, strict=True):
        np.testing.assert_array_equal(one.blocks, two.blocks)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (24, (1, 2, 4, 8, 16, 24))],
)
def test_buckets(limit: int, expected: tuple[int, ...]) -> None:
    assert buckets(limit) == expected


def test_a_padded_batch_has_the_same_addresses_in_every_step(golden: Path) -> None:
    buffer = load_engine(golden / "llm" / "tiny_a", max_batch=4).runner.buffer
    first = buffer.pad(4).ids.data_ptr()
    buffer.pad(2)
    assert buffer.pad(4).ids.data_ptr() == first


def test_no_bucket_is_larger_than_a_step(golden: Path) -> None:
    engine = recorded(load_engine(golden / "llm" / "tiny_a", max_batch=8, max_step_tokens=3))
    assert sorted(engine.runner.graphs._steps) == [1, 2, 3]
    assert len(engine.generate([[i] for i in range(1, 7)], SEEDED)) == 6


def test_verifying_the_head_is_not_recorded(golden: Path) -> None:
    engine = recorded(load_engine(golden / "llm" / "tiny_a", verify_head=True))
    assert not engine.runner.graphs.is_captured
    engine.generate([[1, 2]], SEEDED)
    counts = engine.stats()
    assert (counts.graph_replays, counts.graph_misses) == (0, 0)


def test_sleeping_forgets_and_the_counts_stay(golden: Path) -> None:
    engine = recorded(load_engine(golden / "llm" / "tiny_a"))
    engine.generate([[1, 2]], SEEDED)
    before = engine.stats()
    assert before.graph_replays > 0
    runner = engine.runner
    offloaded = runner.offload()
    assert not runner.graphs.is_captured
    offloaded.restore()
    engine.sleep("disk")
    engine.wake()
    assert engine.stats() == before
    recorded(engine).generate([[1, 2]], SEEDED)
    assert engine.stats().graph_replays == 2 * before.graph_replays


def test_waking_records_again_or_sleeps_on(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where sleep keeps a copy of the weights and all addresses change."""
    monkeypatch.setattr(EngineConfig, "on_device", lambda self, kind: self)
    monkeypatch.setattr("kelix_rt.runner.CudaRecorder", lambda device: record)
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    engine = load_engine(golden / "llm" / "tiny_a", num_pages=64, **parts)
    expected = engine.generate([[1, 2]], SEEDED)[0].blocks
    runner = engine.runner
    engine._offloaded = runner.offload()
    engine.scheduler.pool.reset_cache()

    def no_memory(recorder: object) -> None:
        raise RuntimeError("no memory for graphs")

    with monkeypatch.context() as patch:
        patch.setattr(runner.denoise_graphs, "capture", no_memory)
        with pytest.raises(RuntimeError, match="no memory for graphs"):
            engine.wake()
    assert engine.is_asleep
    assert not runner.graphs.is_captured, "the next wake moves what these would read"
    assert runner.kv.k.untyped_storage().nbytes() == 0
    engine.wake()
    before = engine.stats().graph_replays
    np.testing.assert_array_equal(engine.generate([[1, 2]], SEEDED)[0].blocks, expected)
    assert engine.stats().graph_replays == 2 * before > 0


def test_graphs_are_for_gpus(golden: Path) -> None:
    """By default on, off on a CPU whatever is asked; so nothing of CUDA is touched there."""
    assert EngineConfig().on_device("cuda").cuda_graphs
    assert not EngineConfig(cuda_graphs=False).on_device("cuda").cuda_graphs
    engine = load_engine(golden / "llm" / "tiny_a", cuda_graphs=True)
    engine.warm_up()
    assert not engine.options.cuda_graphs
    assert not engine.runner.graphs.is_captured


def test_start_up_records_where_the_options_ask(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose recorder is replaced."""
    monkeypatch.setattr(EngineConfig, "on_device", lambda self, kind: self)
    monkeypatch.setattr("kelix_rt.runner.CudaRecorder", lambda device: record)
    path = golden / "llm" / "tiny_a"
    assert not load_engine(path, cuda_graphs=False).runner.graphs.is_captured
    engine = load_engine(path)
    assert sorted(engine.runner.graphs._steps) == [1, 2, 4, 8, 16, 32]
    steps = dict(engine.runner.graphs._steps)
    engine.warm_up()
    assert engine.runner.graphs._steps == steps, "nothing is recorded twice"
