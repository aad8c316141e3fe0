"""Decides what the next step computes: images to encode, rows of blocks, or denoise steps.

The three kinds of work take turns while they have something to do, so a long prompt, a running
reply and an image in the making share the device. Inside a block step, rows that decode come
first and prompts fill the rest of the budget in chunks. When pages run out, the request admitted
last gives its pages back and is computed again later. A decoding row may have guessed ones behind
it (`kelix_rt.speculation`), where neither rows nor pages of another request are lost by it.

The bound on the time between two blocks of a request, in steps: every block step gives a block to
every request that decodes, and of three steps in a row at least one is a block step. In between run
at most one pass of the vision tokenizer over one image, and either one denoise step of at most
max_render_batch drawings or the decoding of one picture. A block step computes at most
max_step_tokens rows, whatever prompts wait. Only a request that lost its pages waits longer, and
the one admitted first loses none. In the same way of three steps one encodes and one draws. No
torch here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kelix_rt.ahead import plan_ahead
from kelix_rt.errors import CapacityError
from kelix_rt.plans import BlockPlan, EncodePlan, PicturePlan, RenderPlan, Span, StepPlan
from kelix_rt.sequence import Sequence
from kelix_rt.speculation import DRAFT_ROWS, Drafter

if TYPE_CHECKING:
    from kelix_rt._host import PagePool


MAX_RENDER_BATCH = 8


class Scheduler:
    """Holds every unfinished request in its queue and the pages in the pool."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch: int,
        max_step_tokens: int,
        prefix_cache: bool,
        max_render_batch: int = MAX_RENDER_BATCH,
        drafter: Drafter | None = None,
    ) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.prefix_cache = prefix_cache
        self.max_render_batch = max_render_batch
        self.drafter = drafter
        self.to_encode: deque[Sequence] = deque()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.rendering: deque[Sequence] = deque()
        self.denoised: deque[Sequence] = deque()
        self._planners: deque[Callable[[], StepPlan | None]] = deque(
            (self._plan_encode, self._plan_blocks, self._plan_render)
        )
        self._blocked: tuple[Sequence, int, int] | None = None

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running or self.rendering or self.denoised)

    @property
    def capacity(self) -> int:
        """Positions that one request can have when it runs alone."""
        return self.pool.num_pages * self.pool.page_size

    def add(self, sequence: Sequence) -> None:
        """Queues a request. CapacityError when it could not run even alone."""
        pages = self._pages(sequence.max_positions)
        if pages > self.pool.num_pages:
            raise CapacityError(
                f"request: {sequence.prompt_length} prompt blocks and max_blocks="
                f"{sequence.ends.max_blocks} need {pages} KV pages of {self.pool.page_size}, but "
                f"there are {self.pool.num_pages}; lower max_blocks or raise num_pages"
            )
        self.waiting.append(sequence)
        if sequence.images:
            self.to_encode.append(sequence)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when every request is finished."""
        for _ in range(len(self._planners)):
            self._planners.rotate(-1)
            plan = self._planners[0]()
            if plan is not None:
                return plan
        return None

    def schedule_ahead(self, under_way: BlockPlan) -> BlockPlan | RenderPlan | PicturePlan | None:
        """The step after a block step whose blocks are not read yet; None where it has to wait.

        Kinds of work take turns as in `schedule`. Images wait: their step ends with a read, which
        would hold the blocks up.
        """
        for turn in range(1, len(self._planners) + 1):
            planner = self._planners[turn % len(self._planners)]
            plan: StepPlan | None
            if planner == self._plan_blocks:
                plan = plan_ahead(self, under_way)
                if plan is None:
                    return None
            else:
                plan = planner()
            if isinstance(plan, EncodePlan):
                return None
            if plan is not None:
                self._planners.rotate(-turn)
                return plan
        return None

    def advance(self, plan: BlockPlan) -> None:
        """Books the rows of a block step that has run; full pages become shareable.

        Accepted drafts must be appended before. Rejected ones stay what they are, rows behind the
        known ones: their keys and values are overwritten before anything reads them.
        """
        for span in plan.spans:
            sequence = span.sequence
            if sequence.handle is None:  # aborted or failed meanwhile
                continue
            sequence.advance(min(span.end, sequence.length) - span.start)
            # A prompt is shared once its first block was drawn, so never one that gives NaN.
            if self.prefix_cache and sequence.pending == 0:
                full = sequence.computed - sequence.computed % self.pool.page_size
                if full > self.pool.num_committed(sequence.handle):
                    self.pool.commit(sequence.handle, sequence.rows[:full])

    def start_render(self, sequence: Sequence) -> None:
        """Moves a sequence whose blocks are all there to the denoise queue; frees its pages."""
        self.remove(sequence)
        self.rendering.append(sequence)

    def finish_render(self, sequence: Sequence) -> None:
        """Books that the denoise steps of a drawing are all taken."""
        self.rendering.remove(sequence)
        self.denoised.append(sequence)

    def encoded(self, sequence: Sequence) -> None:
        """Books that the next image of a sequence is codes now."""
        sequence.images.popleft()
        if not sequence.images:
            self.to_encode.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of every queue and gives its pages back; at any time."""
        queues = (self.to_encode, self.waiting, self.running, self.rendering, self.denoised)
        for queue in queues:
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)

    def _plan_encode(self) -> EncodePlan | None:
        return EncodePlan((self.to_encode[0],)) if self.to_encode else None

    def _plan_render(self) -> RenderPlan | PicturePlan | None:
        if self.denoised:  # one by one: a picture takes as long as several denoise steps
            return PicturePlan((self.denoised[0],))
        if not self.rendering:
            return None
        # Always the oldest ones: a batch that stays together is set up only once. Of one size: one
        # that is too large for the memory fails its whole step.
        size = _picture_size(self.rendering[0])
        alike = [sequence for sequence in self.rendering if _picture_size(sequence) == size]
        return RenderPlan(tuple(alike[: self.max_render_batch]))

    def _plan_blocks(self) -> BlockPlan | None:
        spans: dict[Sequence, Span] = {}
        budget = self.max_step_tokens
        draft_rows = DRAFT_ROWS
        # Decoding rows first. Admission needs budget to spare, so there is one left for each.
        order = sorted(self.running, key=lambda s: s.pending > 1)
        for index, sequence in enumerate(order):
            if budget == 0:
                break
            if sequence.handle is None:  # preempted by one before it
                continue
            count = min(sequence.pending, budget)
            while not self.grow(sequence, sequence.computed + count):
                victim = self.running[-1]
                self._preempt(victim)
                taken = spans.pop(victim, None)
                budget += taken.count if taken else 0
                if victim is sequence:
                    break
            if sequence.handle is not None:
                others = len(order) - index - 1
                drafts = self._draft(sequence, min(draft_rows, budget - count - others))
                draft_rows -= drafts
                spans[sequence] = self._span(sequence, count, drafts)
                budget -= count + drafts
        budget = self.admit_waiting(spans, budget)
        return BlockPlan(tuple(spans.values())) if spans else None

    def admit_waiting(self, spans: dict[Sequence, Span], budget: int) -> int:
        """Gives waiting requests pages and spans while both last; the rows left of `budget`.

        In order, but for requests whose images are not all encoded: those let others by.
        """
        while budget and len(self.running) < self.max_batch:
            sequence = next((one for one in self.waiting if not one.images), None)
            if sequence is None or not self._admit(sequence):
                break
            count = min(sequence.pending, budget)
            if not self.grow(sequence, sequence.computed + count):
                raise RuntimeError("scheduler: the pool refused pages it had counted as available")
            self.waiting.remove(sequence)
            self.running.append(sequence)
            spans[sequence] = self._span(sequence, count)
            budget -= count
        return budget

    def _admit(self, sequence: Sequence) -> bool:
        """Takes the cached prefix if all known rows and one page for each running one fit."""
        if self.running and self._blocked == self._admission_key(sequence):
            return False  # nothing changed since the last try
        rows = sequence.rows[: self._shareable(sequence)] if self.prefix_cache else None
        handle, matched = self.pool.add(rows)
        needed = self._pages(sequence.length) - self._pages(matched) + len(self.running)
        if needed > self.pool.num_available:
            self.pool.release(handle)
            self._blocked = self._admission_key(sequence)
            return False
        self._blocked = None
        sequence.handle = handle
        sequence.computed = matched
        if sequence.preemptions == 0:
            sequence.cached = matched
        sequence.admitted = sequence.admitted or time.perf_counter()
        return True

    def _admission_key(self, sequence: Sequence) -> tuple[Sequence, int, int]:
        return sequence, self.pool.num_available, len(self.running)

    def _shareable(self, sequence: Sequence) -> int:
        """Rows offered to the prefix cache; it never matches the last one of them.

        Rows whose hidden state is still wanted have to be computed.
        """
        if sequence.hidden_from is None:
            return sequence.length
        return min(sequence.length, sequence.hidden_from + sequence.hidden_count + 1)

    def _draft(self, sequence: Sequence, room: int) -> int:
        """Writes guessed rows, `room` at most, behind the known ones; their number."""
        if self.drafter is None or room < 1 or sequence.pending != 1 or sequence.image_closed:
            return 0
        drafts = self.drafter.propose(sequence)
        if drafts is None:
            return 0
        drafts = drafts[: min(room, sequence.room_for_drafts(drafts))]
        end = sequence.length + len(drafts)
        # As at admission: a page is left for every running request, so a guess preempts nobody.
        pages = self._pages(end) - self._pages(sequence.length) + len(self.running)
        if not len(drafts) or pages > self.pool.num_available or not self.grow(sequence, end):
            return 0
        sequence.rows[sequence.length : end] = drafts
        return len(drafts)

    def _span(self, sequence: Sequence, count: int, drafts: int = 0) -> Span:
        wants_block = sequence.wants_block(sequence.computed + count)
        return Span(sequence, sequence.computed, count + drafts, wants_block, drafts)

    def grow(self, sequence: Sequence, rows: int) -> bool:
        """Makes room for `rows` rows of an admitted sequence; False where pages lack."""
        return sequence.handle is not None and self.pool.grow(sequence.handle, rows)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.handle is not None:
            self.pool.release(sequence.handle)
        sequence.handle = None
        sequence.computed = 0

    def _pages(self, rows: int) -> int:
        return -(-rows // self.pool.page_size)


def _picture_size(sequence: Sequence) -> tuple[int | None, int | None]:
    assert sequence.render is not None
    return sequence.render.height, sequence.render.width
