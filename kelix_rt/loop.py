"""The loop: unfinished requests, one step at a time, typed events out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kelix_rt.errors import AsleepError, KelixError
from kelix_rt.jobs import Jobs
from kelix_rt.one_thread import OneThread
from kelix_rt.outcome import aborted_output, not_finite, output_of
from kelix_rt.plans import BlockPlan, EncodePlan, PicturePlan, RenderPlan, StepPlan
from kelix_rt.request import (
    BlockEvent,
    Event,
    ImageDone,
    ImageProgress,
    Output,
    RequestDone,
    RequestFailed,
)
from kelix_rt.scheduler import Scheduler
from kelix_rt.sequence import Sequence
from kelix_rt.stats import EngineStats

if TYPE_CHECKING:
    from PIL.Image import Image

    from kelix_rt.block_steps import Flight
    from kelix_rt.config import KelixConfig
    from kelix_rt.offload import Offloaded
    from kelix_rt.runner import Runner


class Loop:
    """Continuous batching over one runner. Not thread-safe: one thread calls all methods, and one
    that comes while another is inside gets a KelixError.

    A request is a sequence from `submit` on; before, it may be a job that makes its prompt.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner: Runner | None = runner  # None while the weights are left to the disk
        self._offloaded: Offloaded | None = None  # set while they are kept in main memory
        self.image_cache = None if runner.encode is None else runner.encode.cache
        self.graph_counts = runner.graph_counts
        self.scheduler = scheduler
        self.config: KelixConfig = runner.model.config
        self._requests: dict[int, Sequence] = {}
        self._jobs = Jobs.on_a_thread() if runner.overlaps else Jobs.at_once()
        self._mail: dict[int, deque[Event]] = {}  # of calls that wait for a request
        self._unread: deque[Event] = deque()
        self._flight: Flight | None = None  # a block step under way, launched ahead
        self.counts = EngineStats()
        self._one_thread = OneThread()

    @property
    def runner(self) -> Runner:
        """The models and their memory. AsleepError while the engine sleeps."""
        if self._runner is None or self._offloaded is not None:
            raise AsleepError("the engine sleeps and takes no requests; call wake() first")
        return self._runner

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, or `step` has events to hand out."""
        return self.scheduler.has_work or bool(self._unread) or len(self._jobs) > 0

    def stats(self) -> EngineStats:
        """What was done since the start, as a copy."""
        cache, graphs, runner = self.image_cache, self.graph_counts, self._runner
        escapes = 0 if runner is None else runner.generate.head_escapes
        return replace(
            self.counts,
            image_hits=0 if cache is None else cache.hits,
            image_misses=0 if cache is None else cache.misses,
            graph_replays=graphs.replays,
            graph_misses=graphs.misses,
            head_escapes=self.counts.head_escapes + escapes,
        )

    def submit(self, sequence: Sequence) -> int:
        """Queues a request and returns its number. CapacityError when it could never run."""
        with self._one_thread:
            self.scheduler.add(sequence)
            self._requests[sequence.request_id] = sequence
        return sequence.request_id

    def abort(self, request_id: int) -> Output | None:
        """Ends a request at once, frees what it holds and emits its RequestDone.

        None when there is no such request, it has ended, or its output cannot be made; the last
        emits RequestFailed.
        """
        with self._one_thread:
            sequence = self._requests.get(request_id)
            if sequence is None:
                return self._abort_prompt(request_id)
            sequence.finish_reason = "abort"
            output = self._finish(sequence)
            self._forget_flight()
            return output

    def _abort_prompt(self, request_id: int) -> Output | None:
        """Ends a request whose prompt is still being made; None where there is none."""
        if request_id not in self._jobs:
            return None
        self._jobs.cancel(request_id)
        output = aborted_output(request_id, self.config.num_codes + 1)
        self._emit(RequestDone(request_id, output))
        return output

    def step(self) -> list[Event]:
        """Runs one step; the events it caused, [] when there is nothing to do.

        An exception inside the step fails the requests of that step (RequestFailed) and leaves
        the others as they were. KeyboardInterrupt and the like fail them too and are raised.
        Events of requests that another call of this engine waits for go to that call.
        """
        self._step()
        events = list(self._unread)
        self._unread.clear()
        return events

    def _emit(self, event: Event) -> None:
        self._mail.get(event.request_id, self._unread).append(event)

    def _step(self) -> bool:
        """Runs one step; whether there was one to run."""
        with self._one_thread:
            return self._run_step()

    def _run_step(self) -> bool:
        """As `_step`, for the thread that is inside.

        Of a block step the blocks are read only after the next step was launched, where that can
        be planned without them; that one is then under way when this returns.
        """
        booked = self._book_jobs()
        flight, self._flight = self._flight, None
        if flight is None:
            plan = self.scheduler.schedule()
            if plan is None:
                return booked or self._wait_for_job()
            with self._failing(plan):
                flight = self._start(plan)
            if flight is None:
                return True
        ahead = self.scheduler.schedule_ahead(flight.plan) if self.runner.overlaps else None
        with self._failing(ahead):
            try:
                if ahead is not None:
                    self._flight = self._start(ahead, after=flight)
            finally:
                with self._failing(flight.plan):
                    self._land(flight)
        return True

    def _book_jobs(self) -> bool:
        """Takes the results of jobs that are done; whether there were any."""
        booked = False
        while (job := self._jobs.pop_done()) is not None:
            booked = True
            try:
                job.then(job.future.result())
            except Exception as error:
                self._fail_job(job.request_id, error)
        return booked

    def _fail_job(self, request_id: int, error: Exception) -> None:
        sequence = self._requests.get(request_id)
        if sequence is None:  # its prompt could not be made
            self._emit(RequestFailed(request_id, error))
        else:
            self._fail(sequence, error)

    def _wait_for_job(self) -> bool:
        self._jobs.wait()
        return self._book_jobs()

    @contextmanager
    def _failing(self, plan: StepPlan | None) -> Iterator[None]:
        """An exception inside fails the requests of the plan; an interrupt is raised too."""
        sequences = () if plan is None else plan.sequences
        try:
            yield
        except Exception as error:
            self._fail_all(sequences, error)
        except BaseException as error:
            self._fail_all(sequences, KelixError(f"the step was interrupted: {error!r}"))
            raise

    def _start(self, plan: StepPlan, after: Flight | None = None) -> Flight | None:
        """Launches a block step, which is then under way; runs one of another kind."""
        if isinstance(plan, BlockPlan):
            flight = self.runner.blocks.launch(plan, after)
            self.counts.block_steps += 1
            self.counts.steps_ahead += after is not None
            return flight
        if isinstance(plan, RenderPlan):
            self.counts.render_steps += 1
            self._run_render(plan)
        elif isinstance(plan, PicturePlan):
            self._run_picture(plan)
        else:
            self.counts.encode_steps += 1
            self._run_encode(plan)
        return None

    def _run_encode(self, plan: EncodePlan) -> None:
        for sequence in plan.sequences:
            for ids in self.runner.run_encode(sequence):
                sequence.place_image(ids)
                self.scheduler.encoded(sequence)

    def _land(self, flight: Flight) -> None:
        """Reads a block step and books it; requests that ended while it was under way get none."""
        drawn = self.runner.blocks.read(flight)
        drawn = [(span, blocks) for span, blocks in drawn if not span.sequence.image_closed]
        self.counts.blocks_dropped += len(flight.drawn) - len(drawn)
        for span, blocks in drawn:
            for block in blocks[:-1]:
                self._append(span.sequence, block)
            self.counts.drafts_accepted += len(blocks) - 1
            self.counts.drafts_rejected += 1 + span.drafts - len(blocks)
            if (blocks[-1] < 0).any():
                self._fail(span.sequence, not_finite(span.sequence))
        self.scheduler.advance(flight.plan)
        for span, blocks in drawn:
            if span.sequence.runs:
                self._append(span.sequence, blocks[-1])
        for sequence in flight.plan.sequences:
            if sequence.finish_reason is None or not sequence.runs:
                continue
            sequence.blocks_done = time.perf_counter()
            if sequence.draws:
                self.scheduler.start_render(sequence)
            else:
                self._finish(sequence)
        self._forget_flight()

    def _append(self, sequence: Sequence, block: np.ndarray) -> None:
        sequence.append(block)
        self.counts.blocks += 1
        ids = tuple(block.tolist())
        self._emit(BlockEvent(sequence.request_id, sequence.generated - 1, ids))

    def _start_render(self, sequence: Sequence) -> bool:
        """Whether a drawing could be begun; its failure is nobody else's. It begins with its first
        step, because a condition for the DiT takes much more memory than the states it is of."""
        try:
            self.runner.start_render(sequence)
        except Exception as error:
            self._fail(sequence, error)
            return False
        return True

    def _run_render(self, plan: RenderPlan) -> None:
        ready = [one for one in plan.sequences if one.render_state or self._start_render(one)]
        for sequence, (step, steps) in self.runner.run_render(ready) if ready else ():
            self._emit(ImageProgress(sequence.request_id, step, steps))
            if step == steps:
                self.scheduler.finish_render(sequence)

    def _run_picture(self, plan: PicturePlan) -> None:
        for sequence in plan.sequences:
            picture = self.runner.start_picture(sequence)
            self.scheduler.remove(sequence)
            self.counts.pictures += 1
            self._jobs.start(sequence.request_id, picture, partial(self._finish, sequence))
        self._book_jobs()

    def _finish(self, sequence: Sequence, image: Image | None = None) -> Output | None:
        """Takes a request out and emits its last events; where its output cannot be made, that is
        its failure, and nobody else's."""
        try:
            wanted = sequence.hidden_from == 0 and sequence.hidden_parts
            hidden = self.runner.hidden(sequence) if wanted else None
            output = output_of(sequence, image, hidden)
        except Exception as error:
            self._fail(sequence, error)
            return None
        self._remove(sequence)
        if output.image is not None:
            self._emit(ImageDone(sequence.request_id, output.image))
        self._emit(RequestDone(sequence.request_id, output))
        return output

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._remove(sequence)
        self._emit(RequestFailed(sequence.request_id, error))

    def _fail_all(self, sequences: Items[Sequence], error: Exception) -> None:
        for sequence in sequences:
            if sequence.request_id in self._requests:
                self._fail(sequence, error)
        self._forget_flight()

    def _remove(self, sequence: Sequence) -> None:
        del self._requests[sequence.request_id]
        self._jobs.cancel(sequence.request_id)
        self.scheduler.remove(sequence)
        self.runner.drop_render(sequence)

    def _forget_flight(self) -> None:
        """Drops the step under way once nobody is left to read it."""
        flight = self._flight
        if flight is not None and not any(one.runs for one in flight.plan.sequences):
            self.counts.blocks_dropped += len(flight.drawn)
            self._flight = None
