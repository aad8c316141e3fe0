"""The step after one that is under way: what is planned, and what has to wait."""

from __future__ import annotations

import pytest

from kelix_rt.plans import BlockPlan, PicturePlan, RenderPlan
from kelix_rt.scheduler import Scheduler
from kelix_rt.sequence import Sequence
from tests.scheduler_helpers import PAGE, Guesses, make_scheduler, make_sequence, run_blocks


class Expecting(Guesses):
    """Guesses three blocks where `due` blocks are generated, and knows it one block before."""

    def __init__(self, due: int) -> None:
        super().__init__(3, 3)
        self.due = due

    def propose(self, sequence: Sequence):
        return super().propose(sequence) if sequence.generated == self.due else None

    def expects(self, sequence: Sequence) -> bool:
        return sequence.generated + 1 == self.due


def under_way(scheduler: Scheduler, *sequences: Sequence, decode: bool = True) -> BlockPlan:
    """A plan in which all of them decode, or in which their prompts are computed."""
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    if decode:
        run_blocks(scheduler, plan)
        plan = scheduler.schedule()
    return plan


def test_every_request_goes_on_with_the_block_that_is_drawn() -> None:
    scheduler = make_scheduler()
    first, second = make_sequence(1), make_sequence(2, prompt=7)
    plan = under_way(scheduler, first, second)
    ahead = scheduler.schedule_ahead(plan)
    assert [(span.sequence, span.start, span.count) for span in ahead.spans] == [
        (first, 6, 1),
        (second, 8, 1),
    ]
    assert all(span.unread and span.wants_block and not span.drafts for span in ahead.spans)
    assert (first.length, first.computed) == (6, 5), "nothing is booked before it is known"
    run_blocks(scheduler, plan)
    again = scheduler.schedule()
    assert [(s.sequence, s.start, s.count) for s in again.spans] == [
        (s.sequence, s.start, s.count) for s in ahead.spans
    ]


def test_the_rest_of_a_prompt_is_known() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    sequence = make_sequence(1, prompt=10)
    plan = under_way(scheduler, sequence, decode=False)
    places = []
    for _ in range(3):
        ahead = scheduler.schedule_ahead(plan)
        (span,) = ahead.spans
        places.append((span.start, span.count, span.wants_block, span.unread))
        run_blocks(scheduler, plan)
        plan = ahead
    assert places == [(4, 4, False, False), (8, 2, True, False), (10, 1, True, True)]


def test_requests_that_wait_are_admitted_behind_blocks_but_not_behind_prompts() -> None:
    scheduler = make_scheduler(max_step_tokens=5)
    first, second = make_sequence(1), make_sequence(2)
    prompt = under_way(scheduler, first, second, decode=False)
    assert scheduler.schedule_ahead(prompt) is None, "second may share the pages of first"
    run_blocks(scheduler, prompt)
    scheduler.remove(second)
    plan = scheduler.schedule()
    scheduler.add(third := make_sequence(3, prompt=4))
    ahead = scheduler.schedule_ahead(plan)
    assert [(s.sequence, s.count, s.unread) for s in ahead.spans] == [
        (first, 1, True),
        (third, 4, False),
    ]


@pytest.mark.parametrize("draw", [False, True])
def test_nobody_goes_on_behind_the_last_block(draw: bool) -> None:
    scheduler = make_scheduler()
    short, long = make_sequence(1, max_blocks=2, draw=draw), make_sequence(2, max_blocks=9)
    plan = under_way(scheduler, short, long)
    ahead = scheduler.schedule_ahead(plan)
    assert [span.sequence for span in ahead.spans] == [long]
    run_blocks(scheduler, plan)
    assert not short.runs
    other = make_scheduler()
    assert other.schedule_ahead(under_way(other, make_sequence(3, max_blocks=2))) is None


def test_an_image_that_is_closed_is_fed_once() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1, max_blocks=9, draw=True)
    plan = under_way(scheduler, sequence)
    run_blocks(scheduler, plan)
    plan = scheduler.schedule()  # draws the third block, which closes the image
    ahead = scheduler.schedule_ahead(plan)
    assert ahead.spans[0].wants_block, "not known yet"
    run_blocks(scheduler, plan)
    assert sequence.image_closed
    assert scheduler.schedule_ahead(ahead) is None


def test_a_missing_page_waits_and_takes_nobodys() -> None:
    scheduler = make_scheduler(num_pages=4, prefix_cache=False)
    first, second = (make_sequence(n, prompt=PAGE, max_blocks=9) for n in (1, 2))
    plan = under_way(scheduler, first, second)
    for _ in range(3):  # until both fill their second page
        ahead = scheduler.schedule_ahead(plan)
        assert ahead is not None
        run_blocks(scheduler, plan)
        plan = ahead
    assert scheduler.schedule_ahead(plan) is None
    assert first.runs and second.runs
    run_blocks(scheduler, plan)
    scheduler.schedule()
    assert second.preemptions == 1


def test_drafts_are_waited_for() -> None:
    drafter = Expecting(due=3)
    scheduler = make_scheduler(drafter=drafter)
    sequence = make_sequence(1, max_blocks=12)
    plan = under_way(scheduler, sequence)
    ahead = scheduler.schedule_ahead(plan)  # behind the second block nothing is due
    assert ahead is not None
    run_blocks(scheduler, plan)
    assert scheduler.schedule_ahead(ahead) is None, "behind the third there may be drafts"
    run_blocks(scheduler, ahead)
    guessed = scheduler.schedule()
    assert guessed.spans[0].drafts == 3
    assert scheduler.schedule_ahead(guessed) is None, "how many hold is not known"


def test_kinds_of_work_take_turns() -> None:
    scheduler = make_scheduler()
    drawing = make_sequence(1, draw=True)
    under_way(scheduler, drawing)
    scheduler.start_render(drawing)
    plan = under_way(scheduler, make_sequence(2), decode=False)
    if not isinstance(plan, BlockPlan):
        plan = scheduler.schedule()
    ahead = scheduler.schedule_ahead(plan)
    assert isinstance(ahead, RenderPlan)
    run_blocks(scheduler, plan)
    plan = scheduler.schedule()
    assert isinstance(plan, BlockPlan), "after the drawing's turn comes that of the blocks"
    scheduler.finish_render(drawing)
    ahead = scheduler.schedule_ahead(plan)
    assert isinstance(ahead, PicturePlan)
    assert ahead.sequences == (drawing,)


def test_an_image_to_encode_has_its_turn() -> None:
    scheduler = make_scheduler()
    plan = under_way(scheduler, make_sequence(1))
    waiting = make_sequence(2)
    waiting.images.append((None, None))
    scheduler.add(waiting)
    assert scheduler.schedule_ahead(plan) is None
    run_blocks(scheduler, plan)
    assert scheduler.schedule().sequences == (waiting,)
