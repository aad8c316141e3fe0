"""How long requests wait for one another, counted in steps: the bound the scheduler states."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kelix_rt.plans import BlockPlan, EncodePlan, PicturePlan, RenderPlan, StepPlan
from kelix_rt.request import RenderParams
from kelix_rt.scheduler import Scheduler
from kelix_rt.sequence import Sequence
from tests.scheduler_helpers import Guesses, make_scheduler, make_sequence, run_blocks

IN_A_ROW = 3  # steps among which every kind of work that waits has its turn


class Run:
    """Steps a scheduler and notes, per request, the steps in which it got on."""

    def __init__(self, scheduler: Scheduler, denoise_steps: int = 1) -> None:
        self.scheduler = scheduler
        self.denoise_steps = denoise_steps
        self.plans: list[StepPlan] = []
        self.waiting: list[set[str]] = []  # kinds of work there was before each step
        self.blocks: dict[Sequence, list[int]] = {}
        self.taken: dict[Sequence, int] = {}

    def step(self) -> None:
        drawings = self.scheduler.rendering or self.scheduler.denoised
        kinds = {"encode": self.scheduler.to_encode, "draw": drawings}
        self.waiting.append({kind for kind, queue in kinds.items() if queue})
        plan = self.scheduler.schedule()
        assert plan is not None
        now = len(self.plans)
        self.plans.append(plan)
        if isinstance(plan, BlockPlan):
            before = {sequence: sequence.generated for sequence in plan.sequences}
            run_blocks(self.scheduler, plan)
            for sequence, count in before.items():
                if sequence.generated > count:
                    self.blocks.setdefault(sequence, []).append(now)
        elif isinstance(plan, RenderPlan):
            assert len(plan.sequences) <= self.scheduler.max_render_batch
            for sequence in plan.sequences:
                self.taken[sequence] = self.taken.get(sequence, 0) + 1
                if self.taken[sequence] == self.denoise_steps:
                    self.scheduler.finish_render(sequence)
        else:
            (sequence,) = plan.sequences  # one image or one picture a step
            if isinstance(plan, PicturePlan):
                self.scheduler.remove(sequence)
            else:
                self.scheduler.encoded(sequence)

    def to_end(self, limit: int = 3000) -> None:
        while self.scheduler.has_work:
            self.step()
            assert len(self.plans) < limit

    def longest_wait(self, sequence: Sequence) -> int:
        """Steps from one of its blocks to the next, at most."""
        steps = self.blocks[sequence]
        return max((b - a for a, b in pairwise(steps)), default=0)


def asks_about(number: int, images: int, prompt: int = 5) -> Sequence:
    sequence = make_sequence(number, prompt, base=100 * number)
    sequence.images.extend([("patches", "grid")] * images)
    return sequence


def test_a_reply_goes_on_beside_long_prompts_images_and_drawings() -> None:
    """All kinds of work at once: a block in every third step, and turns for the others."""
    scheduler = make_scheduler(num_pages=400, max_batch=6, max_step_tokens=8)
    reply = make_sequence(1, max_blocks=40)
    scheduler.add(reply)
    run = Run(scheduler, denoise_steps=20)
    run.step()
    for number in (2, 3):
        scheduler.add(make_sequence(number, prompt=3, draw=True, base=100 * number))
    while len(scheduler.rendering) < 2:
        run.step()
    for number in (4, 5):
        scheduler.add(asks_about(number, images=12))
    scheduler.add(make_sequence(6, prompt=100, base=2000))
    start = len(run.plans)
    while reply.finish_reason is None:
        run.step()
    assert run.longest_wait(reply) == IN_A_ROW
    busy = run.plans[start : start + 3 * 20]
    for kind in (BlockPlan, EncodePlan, RenderPlan):
        assert sum(isinstance(plan, kind) for plan in busy) == 20, kind
    run.to_end()


def test_alone_a_reply_gets_a_block_every_step() -> None:
    scheduler = make_scheduler()
    reply = make_sequence(1, max_blocks=20)
    scheduler.add(reply)
    run = Run(scheduler)
    run.to_end()
    assert run.longest_wait(reply) == 1


@pytest.mark.parametrize("drafter", [None, Guesses(4, 2)])
def test_a_long_prompt_takes_what_decoding_leaves_of_a_step(drafter: Guesses | None) -> None:
    """A prompt of n rows beside d replies is done in n / (budget - d) steps, and delays none."""
    scheduler = make_scheduler(num_pages=400, max_step_tokens=8, drafter=drafter)
    replies = [make_sequence(number, 1, max_blocks=60, base=100 * number) for number in (1, 2, 3)]
    for reply in replies:
        scheduler.add(reply)
    run = Run(scheduler)
    run.step()
    long = make_sequence(9, prompt=52, base=2000)
    scheduler.add(long)
    while not long.generated:
        run.step()
    waited = len(run.plans) - 1
    if drafter is None:
        assert waited == -(-52 // (8 - 3))
    else:  # guesses of the replies come first, but never take the last row of a step
        assert waited <= 52
    for reply in replies:
        assert run.longest_wait(reply) == 1
    run.to_end()


def test_pictures_are_decoded_one_by_one_between_blocks() -> None:
    scheduler = make_scheduler(num_pages=400, max_step_tokens=64)
    reply = make_sequence(1, max_blocks=60)
    scheduler.add(reply)
    drawings = [make_sequence(n, prompt=3, draw=True, base=100 * n) for n in range(2, 8)]
    for drawing in drawings:
        scheduler.add(drawing)
    run = Run(scheduler, denoise_steps=3)
    while scheduler.rendering or scheduler.denoised or len(run.taken) < 6:
        run.step()
    pictures = [i for i, plan in enumerate(run.plans) if isinstance(plan, PicturePlan)]
    assert len(pictures) == 6
    assert all(b - a == 2 for a, b in pairwise(pictures))
    assert run.longest_wait(reply) == 2
    run.to_end()


def test_an_image_of_many_does_not_wait_for_blocks() -> None:
    scheduler = make_scheduler(num_pages=400)
    scheduler.add(make_sequence(1, max_blocks=40))
    asked = asks_about(2, images=7)
    scheduler.add(asked)
    run = Run(scheduler)
    while asked.images:
        run.step()
    assert len(run.plans) <= 2 * 7
    run.to_end()


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 40),  # the step it comes in
            st.integers(1, 30),  # rows of its prompt
            st.integers(1, 20),  # blocks
            st.booleans(),  # draws
            st.integers(0, 4),  # images
        ),
        min_size=1,
        max_size=12,
    ),
    budget=st.integers(2, 17),
    guesses=st.none() | st.tuples(st.integers(1, 6), st.integers(0, 6)),
)
def test_no_mixture_breaks_the_bound(requests: list, budget: int, guesses: tuple | None) -> None:
    """With pages for all of them, every reply gets a block in any three steps once it decodes."""
    scheduler = make_scheduler(
        num_pages=200, max_step_tokens=budget, max_render_batch=3,
        drafter=guesses and Guesses(*guesses),
    )  # fmt: skip
    run = Run(scheduler, denoise_steps=4)
    coming = []
    for number, (step, prompt, blocks, draw, images) in enumerate(requests):
        sequence = make_sequence(number, prompt, blocks, draw=draw, base=100 * (number + 1))
        sequence.images.extend([("patches", "grid")] * images)
        coming.append((step, sequence))
    sequences = [sequence for _, sequence in coming]
    while coming or scheduler.has_work:
        due = [item for item in coming if item[0] <= len(run.plans) or not scheduler.has_work]
        for item in due[:1]:
            scheduler.add(item[1])
            coming.remove(item)
        run.step()
    for sequence in sequences:
        assert sequence.preemptions == 0
        assert run.longest_wait(sequence) <= IN_A_ROW
    for kind, plans in (("encode", EncodePlan), ("draw", RenderPlan | PicturePlan)):
        for first in range(len(run.plans) - IN_A_ROW + 1):
            steps = range(first, first + IN_A_ROW)
            if all(kind in run.waiting[step] for step in steps):
                assert any(isinstance(run.plans[step], plans) for step in steps), kind


def test_the_request_admitted_first_keeps_its_pages() -> None:
    scheduler = make_scheduler(num_pages=8, prefix_cache=False)
    sequences = [make_sequence(n, prompt=4, max_blocks=20, base=100 * n) for n in (1, 2, 3)]
    for sequence in sequences:
        sequence.render = RenderParams() if sequence.request_id == 3 else None
        scheduler.add(sequence)
    run = Run(scheduler)
    run.to_end()
    assert run.longest_wait(sequences[0]) <= IN_A_ROW
    assert sum(sequence.preemptions for sequence in sequences) > 0
