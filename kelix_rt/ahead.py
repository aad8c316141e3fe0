"""The block step after one that is under way, planned before the host has read its blocks.

Nearly all of a plan is known by then: every request that decodes has one row more, whose position,
page, seed and index do not depend on what is drawn, and the row itself is on the device. What can
turn out otherwise is that the block ends its request; the row is then computed for nothing and
dropped. So a plan is made where the blocks decide nothing else, and not

* behind a step that checks drafts, or a block behind which drafts may be due: how many rows there
  are depends on it,
* where a page is missing: which request has to give pages back depends on who has ended,
* behind a prompt's rows while requests wait: they may find these rows in the prefix cache, which
  gets them when the step is read.

No torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kelix_rt.plans import BlockPlan, Span
from kelix_rt.sequence import Sequence

if TYPE_CHECKING:
    from kelix_rt.scheduler import Scheduler


class _Expected(NamedTuple):
    """Where a request stands behind the step under way. unread: its last row is drawn there."""

    sequence: Sequence
    start: int
    pending: int
    unread: bool


def plan_ahead(scheduler: Scheduler, under_way: BlockPlan) -> BlockPlan | None:
    """The step after `under_way` as if no block of it ended a request; None where that has to wait.

    Never takes pages of another request and never guesses blocks.
    """
    if _decides(scheduler, under_way):
        return None
    flown = {span.sequence: span for span in under_way.spans}
    expected = [_expected(sequence, flown.get(sequence)) for sequence in scheduler.running]
    spans: dict[Sequence, Span] = {}
    budget = scheduler.max_step_tokens
    for sequence, start, pending, unread in sorted(expected, key=lambda rows: rows.pending > 1):
        count = min(pending, budget)
        if count == 0:
            continue
        if not scheduler.grow(sequence, start + count):
            return None
        wants_block = unread or sequence.wants_block(start + count)
        spans[sequence] = Span(sequence, start, count, wants_block, unread=unread)
        budget -= count
    scheduler.admit_waiting(spans, budget)
    return BlockPlan(tuple(spans.values())) if spans else None


def _decides(scheduler: Scheduler, under_way: BlockPlan) -> bool:
    """Whether the blocks of a step decide more than who goes on."""
    if scheduler.waiting and any(span.count > 1 for span in under_way.spans):
        return True
    drafter = scheduler.drafter
    return any(
        span.drafts or (drafter is not None and span.wants_block and drafter.expects(span.sequence))
        for span in under_way.spans
    )


def _expected(sequence: Sequence, span: Span | None) -> _Expected:
    start = sequence.computed if span is None else span.end
    draws = span is not None and span.wants_block and not sequence.image_closed
    if draws and sequence.generated + 1 == sequence.ends.max_blocks:
        return _Expected(sequence, start, 0, False)  # it ends, or the image is closed: not known
    return _Expected(sequence, start, sequence.length - start + draws, draws)
