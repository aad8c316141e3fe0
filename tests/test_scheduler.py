"""The scheduler against a pretended model: fairness, paging, preemption, nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kelix_rt.errors import CapacityError
from kelix_rt.plans import BlockPlan, EncodePlan, PicturePlan, RenderPlan
from kelix_rt.request import RenderParams
from kelix_rt.sequence import EndRules
from tests.scheduler_helpers import (
    IMAGE_END,
    PAGE,
    Guesses,
    make_scheduler,
    make_sequence,
    run_all,
    run_blocks,
)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    scheduler = make_scheduler(max_step_tokens=3)
    sequence = make_sequence(1, prompt=8, max_blocks=1)
    scheduler.add(sequence)
    plans = run_all(scheduler)
    assert [plan.spans[0].count for plan in plans] == [3, 3, 2]
    assert [plan.spans[0].wants_block for plan in plans] == [False, False, True]


def test_decoding_rows_come_before_prompt_chunks() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    first, second = make_sequence(1, prompt=4), make_sequence(2, prompt=9, base=500)
    scheduler.add(first)
    run_blocks(scheduler, scheduler.schedule())
    scheduler.add(second)
    plan = scheduler.schedule()
    assert [(s.sequence.request_id, s.count) for s in plan.spans] == [(1, 1), (2, 3)]


def test_no_more_requests_run_than_the_budget_has_rows() -> None:
    scheduler = make_scheduler(max_step_tokens=3)
    sequences = [make_sequence(n, prompt=n, max_blocks=9, base=100 * n) for n in range(1, 8)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(12):
        plan = scheduler.schedule()
        decoding = {s for s in scheduler.running if s.generated and s.pending == 1}
        assert decoding <= set(plan.sequences), "a decoding request was passed over"
        run_blocks(scheduler, plan)


def test_admission_is_first_come_first_served() -> None:
    scheduler = make_scheduler(max_batch=2)
    for number in range(1, 6):
        scheduler.add(make_sequence(number, max_blocks=number, base=100 * number))
    order: list[int] = []
    for plan in run_all(scheduler):
        order += [s.sequence.request_id for s in plan.spans if s.sequence.request_id not in order]
        assert len(plan.spans) <= 2
    assert order == [1, 2, 3, 4, 5]


def test_page_pressure_preempts_the_latest_and_everything_finishes() -> None:
    scheduler = make_scheduler(num_pages=6, prefix_cache=False)
    sequences = [make_sequence(n, prompt=4, max_blocks=12, base=100 * n) for n in (1, 2, 3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_all(scheduler)
    assert sequences[0].preemptions == 0
    assert sum(sequence.preemptions for sequence in sequences) > 0
    for sequence in sequences:
        expected = [1000 + 10 * sequence.request_id + i for i in range(12)]
        assert sequence.blocks[:, 0].tolist() == expected


def test_equal_prompts_share_computed_pages() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, prompt=9))
    run_all(scheduler)
    again = make_sequence(2, prompt=9)
    scheduler.add(again)
    plan = scheduler.schedule()
    assert again.cached == 2 * PAGE
    assert plan.spans[0].start == 2 * PAGE


def test_rows_whose_hidden_state_is_wanted_are_computed() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, prompt=9))
    run_all(scheduler)
    again = make_sequence(2, prompt=9)
    again.hidden_from = 0
    scheduler.add(again)
    assert scheduler.schedule().spans[0].start == 0


def test_a_closed_image_is_fed_once_and_rendered() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1, max_blocks=3, draw=True)
    scheduler.add(sequence)
    plans = run_all(scheduler)
    assert isinstance(plans[-2], RenderPlan)
    assert isinstance(plans[-1], PicturePlan)
    assert sequence.finish_reason == "stop"
    assert sequence.generated == 3
    assert [p.spans[0].wants_block for p in plans[:-2]] == [True, True, True, False]
    assert sequence.hidden_count == 4  # the last prompt row and every generated one


def test_drawings_of_one_size_share_a_step() -> None:
    scheduler = make_scheduler()
    for number, side in enumerate((64, 4096, 64)):
        sequence = make_sequence(number, max_blocks=3, draw=True)
        sequence.render = RenderParams(height=side, width=side)
        scheduler.add(sequence)
    run_blocks(scheduler, scheduler.schedule())
    for sequence in list(scheduler.running):
        scheduler.start_render(sequence)
    drawn = []
    while isinstance(plan := scheduler.schedule(), RenderPlan):
        drawn.append([sequence.request_id for sequence in plan.sequences])
        for sequence in plan.sequences:
            scheduler.remove(sequence)
    assert drawn == [[0, 2], [1]]


def test_kinds_of_work_take_turns() -> None:
    scheduler = make_scheduler()
    for number in (1, 2):
        sequence = make_sequence(number, max_blocks=40)
        if number == 1:
            sequence.render = RenderParams()
        scheduler.add(sequence)
    run_blocks(scheduler, scheduler.schedule())
    scheduler.start_render(scheduler.running[0])
    kinds = []
    for _ in range(6):
        plan = scheduler.schedule()
        kinds.append(type(plan))
        if isinstance(plan, BlockPlan):
            run_blocks(scheduler, plan)
    assert kinds.count(BlockPlan) == kinds.count(RenderPlan) == 3


def test_images_are_encoded_before_admission() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1)
    sequence.images.extend([("patches", "grid")] * 3)
    scheduler.add(sequence)
    plans = run_all(scheduler)
    assert all(isinstance(plan, EncodePlan) for plan in plans[:3])
    assert all(isinstance(plan, BlockPlan) for plan in plans[3:])


def test_requests_whose_images_are_not_encoded_let_others_by() -> None:
    scheduler = make_scheduler()
    with_images, text, more = (make_sequence(number) for number in (1, 2, 3))
    with_images.images.extend([("patches", "grid")] * 3)
    for sequence in (with_images, text, more):
        scheduler.add(sequence)
    plan = None
    while not isinstance(plan, BlockPlan):
        plan = scheduler.schedule()
        if isinstance(plan, EncodePlan):
            scheduler.encoded(with_images)
    assert plan.sequences == (text, more)
    assert list(scheduler.waiting) == [with_images] and with_images.images
    run_blocks(scheduler, plan)
    run_all(scheduler)
    assert with_images.generated == 6


def test_a_request_that_never_fits_is_refused() -> None:
    scheduler = make_scheduler(num_pages=2)
    with pytest.raises(CapacityError, match="need 3 KV pages of 4, but there are 2"):
        scheduler.add(make_sequence(1, prompt=5, max_blocks=5))
    assert not scheduler.has_work
    scheduler.add(make_sequence(2, prompt=5, max_blocks=4))
    run_all(scheduler)


def test_guessed_rows_come_after_those_of_every_running_request() -> None:
    scheduler = make_scheduler(max_step_tokens=6, drafter=Guesses(5, 5))
    for number in (1, 2, 3):
        scheduler.add(make_sequence(number, prompt=1, max_blocks=9, base=100 * number))
    run_blocks(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(4, prompt=9, base=900))
    plan = scheduler.schedule()
    assert [(s.sequence.request_id, s.count, s.drafts) for s in plan.spans] == [
        (1, 4, 3),
        (2, 1, 0),
        (3, 1, 0),
    ]
    run_all(scheduler)


def test_a_guess_takes_no_page_that_a_running_request_needs() -> None:
    """The first request ends before it needs a second page; its guesses must not take the last."""
    scheduler = make_scheduler(num_pages=3, prefix_cache=False, drafter=Guesses(3, 0))
    first = make_sequence(1, prompt=2, max_blocks=6)
    first.ends = EndRules(frozenset({1011}), 6)
    second = make_sequence(2, prompt=4, max_blocks=4, base=500)
    for sequence in (first, second):
        scheduler.add(sequence)
    plans = run_all(scheduler)
    assert first.generated == 2
    assert second.preemptions == 0
    assert any(span.drafts for plan in plans for span in plan.spans), "room later on"


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.booleans(), st.integers(0, 2)),
        min_size=1,
        max_size=12,
    ),
    pages=st.integers(9, 24),
    budget=st.integers(1, 17),
    batch=st.integers(1, 6),
    cache=st.booleans(),
    guesses=st.none() | st.tuples(st.integers(1, 6), st.integers(0, 6)),
    aborts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 11)), max_size=4),
)
def test_any_mixture_finishes_with_the_same_blocks(
    requests: list, pages: int, budget: int, batch: int, cache: bool, guesses: tuple | None,
    aborts: list,
) -> None:  # fmt: skip
    scheduler = make_scheduler(
        num_pages=pages, max_step_tokens=budget, max_batch=batch, prefix_cache=cache,
        drafter=guesses and Guesses(*guesses),
    )  # fmt: skip
    sequences = [
        make_sequence(number, prompt, max_blocks, draw=draw, base=100 * group)
        for number, (prompt, max_blocks, draw, group) in enumerate(requests)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    cut = {sequences[index % len(sequences)] for _, index in aborts}
    steps = 0
    while scheduler.has_work:
        for step, index in aborts:
            if step == steps:
                scheduler.remove(sequences[index % len(sequences)])
        plan = scheduler.schedule()
        steps += 1
        assert steps < 3000
        if isinstance(plan, BlockPlan):
            run_blocks(scheduler, plan)
        elif isinstance(plan, RenderPlan):
            scheduler.remove(plan.sequences[0])
    assert scheduler.pool.num_used == 0
    for sequence in sequences:
        if sequence in cut:
            continue
        blocks = sequence.blocks[:, 0].tolist()
        expected = [1000 + 10 * sequence.request_id + i for i in range(len(blocks))]
        if sequence.draws and len(blocks) > 2:
            expected[2] = IMAGE_END
        assert blocks == expected
        limit = min(sequence.ends.max_blocks, 3) if sequence.draws else sequence.ends.max_blocks
        assert len(blocks) == limit
