"""The block stage and the packing in front of it, checked tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kelix_rt import Engine, SamplingParams
from kelix_rt._host import PagePool
from kelix_rt.batch import StepBuffer
from kelix_rt.device_queue import InlineQueue
from kelix_rt.plans import BlockPlan
from kelix_rt.scheduler import Scheduler
from kelix_rt.sequence import EndRules, Sequence
from tests.engine_helpers import fixtures, load_engine

WIDTH, PAGE = 3, 4


def make_sequence(number: int, prompt: int, rule: str = "ancestral", keep: int | None = None):
    rows = np.arange(prompt * WIDTH, dtype=np.int64).reshape(prompt, WIDTH) + 100 * number
    sampling = SamplingParams(temperature=number / 10, rule=rule)
    ends = EndRules(frozenset(), 8)
    return Sequence(number, rows, sampling, number, ends, hidden_from=keep)


@pytest.fixture
def pool() -> PagePool:
    return PagePool(32, PAGE, WIDTH)


@pytest.fixture
def buffer(pool: PagePool) -> StepBuffer:
    sizes = {"max_tokens": 16, "max_batch": 4, "max_positions": 32}
    return StepBuffer(pool, **sizes, queue=InlineQueue())


def plan_of(pool: PagePool, *sequences: Sequence) -> BlockPlan:
    scheduler = Scheduler(pool, max_batch=4, max_step_tokens=16, prefix_cache=False)
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert isinstance(plan, BlockPlan)
    return plan


def test_a_plan_is_packed_row_after_row(pool: PagePool, buffer: StepBuffer) -> None:
    first, second, third = (
        make_sequence(1, 6, "reference"),
        make_sequence(2, 3, keep=1),
        make_sequence(3, 9),
    )
    plan = plan_of(pool, first, second, third)
    batch, drawn, kept = buffer.pack(plan)
    tables = [pool.page_table(s.handle) for s in (first, second, third)]
    context = batch.context
    # 6 + 3 + 7 of 9 rows fill the budget of 16; the last request is not through its prompt yet.
    assert context.query_start.tolist() == [0, 6, 9, 16]
    assert context.context_lens.tolist() == [6, 3, 7]
    assert context.positions.tolist() == [*range(6), *range(3), *range(7)]
    expected = np.concatenate([first.rows[:6], second.rows[:3], third.rows[:7]])
    np.testing.assert_array_equal(batch.ids, expected)
    slots = [t[p // PAGE] * PAGE + p % PAGE for t, n in zip(tables, (6, 3, 7), strict=True)
             for p in range(n)]  # fmt: skip
    assert context.slots.tolist() == slots
    for row, table in zip(context.page_table.tolist(), tables, strict=True):
        assert row[: len(table)] == table.tolist()
    # Ancestral rows come first.
    assert [span.sequence for span in drawn] == [second, first]
    assert batch.num_ancestral == 1
    assert batch.block_rows.tolist() == [8, 5]
    assert batch.seeds.tolist() == [2, 1]
    assert batch.steps.tolist() == [0, 0]
    torch.testing.assert_close(batch.params[:, 0, 0], torch.tensor([0.2, 0.1]))
    assert batch.keep_rows.tolist() == [7, 8]
    assert [(span.sequence, count) for span, count in kept] == [(second, 2)]


def test_equal_sizes_reuse_the_same_addresses(pool: PagePool, buffer: StepBuffer) -> None:
    plan = plan_of(pool, make_sequence(1, 6))
    one, two = (buffer.pack(plan)[0] for _ in range(2))
    assert one is two
    assert one.ids.data_ptr() == two.ids.data_ptr()


def test_kept_rows_are_not_kept_twice(pool: PagePool, buffer: StepBuffer) -> None:
    sequence = make_sequence(1, 6, keep=2)
    sequence.hidden_count = 3  # computed before a preemption
    batch, _, kept = buffer.pack(plan_of(pool, sequence))
    assert batch.keep_rows.tolist() == [5]
    assert kept[0][1] == 1


def test_a_step_without_blocks_draws_nothing(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", max_step_tokens=3)
    engine.add_request([1, 2, 3, 4, 5])
    assert engine.step() == []
    assert len(engine.step()) == 1


def record_head(engine: Engine, golden: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draws gen0 and gives the number of blocks that were compared with the whole head."""
    counted = []
    count = engine.runner.model.count_head_escapes

    def recording(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        counted.append(len(ids))
        return count(hidden, ids)

    monkeypatch.setattr(engine.runner.model, "count_head_escapes", recording)
    data = fixtures(golden / "llm" / "tiny_a")
    sampling = SamplingParams(temperature=0.0, max_blocks=9)
    engine.generate([data["gen0/prompt_ids2d"]], sampling)
    return counted


def test_verify_head_compares_every_block(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", verify_head=True)
    assert record_head(engine, golden, monkeypatch) == [1] * 9
    assert engine.stats().head_escapes == 0


def test_head_escapes_are_counted_over_a_sleep(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", verify_head=True)
    for _ in range(2):
        monkeypatch.setattr(
            engine.runner.model, "count_head_escapes", lambda hidden, ids: torch.tensor([2])
        )
        engine.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_blocks=3))
        engine.sleep("disk")
        engine.wake()
    assert engine.stats().head_escapes == 2 * 3 * 2


def test_the_head_is_not_verified_unasked(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(golden / "llm" / "tiny_a")
    assert record_head(engine, golden, monkeypatch) == []
