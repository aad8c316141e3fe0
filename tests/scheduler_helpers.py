"""What the scheduler tests share: a pretended model, and what must hold of every plan."""

from __future__ import annotations

import numpy as np

from kelix_rt._host import PagePool
from kelix_rt.plans import BlockPlan, EncodePlan, PicturePlan, RenderPlan, Span
from kelix_rt.request import RenderParams, SamplingParams
from kelix_rt.scheduler import Scheduler
from kelix_rt.sequence import EndRules, Sequence

WIDTH = 3
PAGE = 4
EOS = 7
IMAGE_END = 8


def make_scheduler(num_pages: int = 64, **options: object) -> Scheduler:
    values: dict = {"max_batch": 8, "max_step_tokens": 16, "prefix_cache": True} | options
    return Scheduler(PagePool(num_pages, PAGE, WIDTH), **values)


def make_sequence(
    number: int, prompt: int = 5, max_blocks: int = 6, *, draw: bool = False, base: int = 100
) -> Sequence:
    rows = np.full((prompt, WIDTH), 1, dtype=np.int64)
    rows[:, 0] = base + np.arange(prompt)
    ends = EndRules(frozenset({EOS}), max_blocks, IMAGE_END if draw else None)
    render = RenderParams(steps=1) if draw else None
    hidden = prompt - 1 if draw else None
    return Sequence(number, rows, SamplingParams(), 0, ends, render=render, hidden_from=hidden)


def next_block(sequence: Sequence) -> np.ndarray:
    """A pretended model: the block depends on the request and its index only."""
    if sequence.draws and sequence.generated == 2:
        return np.array([IMAGE_END, 0, 0])
    return np.array([1000 + 10 * sequence.request_id + sequence.generated, 0, 0])


def accept_drafts(span: Span) -> int:
    """Appends the drafts that are what the pretended model says; how many there were."""
    sequence = span.sequence
    drafts = sequence.rows[sequence.length : sequence.length + span.drafts].copy()
    for index, draft in enumerate(drafts):
        if not np.array_equal(draft, next_block(sequence)):
            return index
        sequence.append(draft)
        assert sequence.finish_reason is None
        assert not sequence.image_closed
    return len(drafts)


class Guesses:
    """Drafts of the pretended model's blocks, the `wrong`-th of which is spoilt."""

    def __init__(self, count: int, wrong: int) -> None:
        self.count = count
        self.wrong = wrong

    def propose(self, sequence: Sequence) -> np.ndarray:
        known = sequence.generated
        first = [1000 + 10 * sequence.request_id + known + i for i in range(self.count)]
        if sequence.draws and 0 <= 2 - known < self.count:
            first[2 - known] = IMAGE_END
        drafts = np.zeros((self.count, WIDTH), dtype=np.int64)
        drafts[:, 0] = first
        drafts[self.wrong :, 0] += 5000
        return drafts


def run_blocks(scheduler: Scheduler, plan: BlockPlan) -> None:
    assert 0 < sum(span.count for span in plan.spans) <= scheduler.max_step_tokens
    assert len({span.sequence for span in plan.spans}) == len(plan.spans)
    for span in plan.spans:
        assert span.start == span.sequence.computed
        assert scheduler.pool.num_rows(span.sequence.handle) >= span.end
        accepted = accept_drafts(span) if span.drafts else 0
        end = span.end - span.drafts + accepted
        span.sequence.hidden_count += len(span.sequence.new_hidden(span.start, end))
    scheduler.advance(plan)
    for span in plan.spans:
        sequence = span.sequence
        if span.wants_block:
            sequence.append(next_block(sequence))
        if sequence.finish_reason is not None:
            if sequence.draws:
                scheduler.start_render(sequence)
            else:
                scheduler.remove(sequence)
    scheduler.pool.check()


def run_all(scheduler: Scheduler, limit: int = 2000) -> list[object]:
    plans: list[object] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None, "work is left but nothing is planned"
        plans.append(plan)
        assert len(plans) < limit, "no progress"
        if isinstance(plan, BlockPlan):
            run_blocks(scheduler, plan)
        elif isinstance(plan, RenderPlan):
            for sequence in plan.sequences:
                scheduler.finish_render(sequence)
        elif isinstance(plan, PicturePlan):
            scheduler.remove(plan.sequences[0])
        else:
            assert isinstance(plan, EncodePlan)
            scheduler.encoded(plan.sequences[0])
    assert scheduler.schedule() is None
    assert scheduler.pool.num_used == 0
    assert scheduler.pool.num_sequences == 0
    return plans
