"""The loop of the engine: requests in, one step at a time, typed events out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kelix_rt.errors import InputError, KelixError
from kelix_rt.intake import derive_seed, drawing_prompt, end_rules, prompt_rows
from kelix_rt.request import (
    GREEDY_DRAWING,
    BlockEvent,
    Event,
    ImageDone,
    ImageOutput,
    ImageProgress,
    Output,
    Prompt,
    RenderParams,
    RequestDone,
    RequestFailed,
    SamplingParams,
)
from kelix_rt.scheduler import BlockPlan, EncodePlan, RenderPlan, Scheduler, StepPlan
from kelix_rt.sequence import EndRules, Sequence

if TYPE_CHECKING:
    from kelix_rt.config import EngineConfig, KelixConfig
    from kelix_rt.runner import Runner


class EngineCore:
    """Continuous batching over one runner. Not thread-safe: one thread calls all methods."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        options: EngineConfig,
        max_positions: int,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.config: KelixConfig = runner.model.config
        self.options = options
        self.max_positions = max_positions
        self._requests: dict[int, Sequence] = {}
        self._mail: dict[int, deque[Event]] = {}
        self._unread: list[Event] = []
        self._counter = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return self.scheduler.has_work

    def add_request(
        self,
        prompt: Prompt | Items[int] | np.ndarray | Tensor,
        sampling: SamplingParams | None = None,
        *,
        render: RenderParams | None = None,
        return_hidden: bool = False,
    ) -> int:
        """Queues a request and returns its number.

        render: draw an image from the blocks; the prompt then ends with vision_start (added when
        it is missing) and sampling defaults to greedy. return_hidden: keep the last hidden state
        of every input position for Output.hidden. Raises InputError or CapacityError for a
        request that cannot be served, ConfigError for one that needs a part that is not loaded;
        nothing is queued then.
        """
        if not isinstance(prompt, Prompt):
            prompt = Prompt(prompt)
        if render is not None:
            self.runner.render_stage()
            prompt = drawing_prompt(prompt, self.config)
        rows, placed = prompt_rows(prompt, self.config, self.runner.model.expand)
        if prompt.pixel_values is not None:
            self.runner.encode_stage()
        sampling = sampling or (SamplingParams() if render is None else GREEDY_DRAWING)
        ends = end_rules(
            len(rows),
            sampling,
            self.config,
            draw=render is not None,
            max_positions=self.max_positions,
            capacity=self.scheduler.capacity,
            max_condition_length=self.options.max_condition_length,
        )
        hidden_from = 0 if return_hidden else None if render is None else len(rows) - 1
        sequence = self._sequence(rows, sampling, ends, hidden_from, render)
        sequence.placed = placed
        if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
            sequence.pixels = (prompt.pixel_values, prompt.image_grid_thw)
        return self._queue(sequence)

    def add_forced_image(self, prompt: Any, codes: Tensor, render: RenderParams) -> int:
        """Queues the drawing of an image whose codes [T, N] are known; see add_request."""
        self.runner.render_stage()
        given = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        rows, _ = prompt_rows(
            drawing_prompt(given, self.config), self.config, self.runner.model.expand
        )
        blocks = self.runner.image_blocks(codes)
        longest = min(self.options.max_condition_length - 1, self.max_positions - len(rows))
        if len(blocks) > longest:
            raise InputError(
                f"reconstruct: an image of {len(codes)} blocks does not fit, there is room for "
                f"{longest - 1}; encode it at a smaller size"
            )
        ends = EndRules(frozenset(), len(blocks), self.config.qwen_config.vision_end_token_id)
        sequence = self._sequence(rows, GREEDY_DRAWING, ends, len(rows) - 1, render)
        sequence.force(blocks)
        return self._queue(sequence)

    def _sequence(
        self,
        rows: np.ndarray,
        sampling: SamplingParams,
        ends: EndRules,
        hidden_from: int | None,
        render: RenderParams | None,
    ) -> Sequence:
        number = self._counter
        seed = derive_seed(self.options.seed, number) if sampling.seed is None else sampling.seed
        return Sequence(number, rows, sampling, seed, ends, hidden_from=hidden_from, render=render)

    def _queue(self, sequence: Sequence) -> int:
        self.scheduler.add(sequence)
        self._requests[sequence.request_id] = sequence
        self._counter += 1
        return sequence.request_id

    def abort(self, request_id: int) -> Output | None:
        """Ends a request at once and frees what it holds; None when it is not running."""
        sequence = self._requests.get(request_id)
        if sequence is None:
            return None
        sequence.finish_reason = "abort"
        done = self._finish(sequence)
        if request_id in self._mail:
            self._mail[request_id].append(done)
        return done.output

    def step(self) -> list[Event]:
        """Runs one step; the events it caused, [] when there is nothing to do.

        An exception inside the step fails the requests of that step (RequestFailed) and leaves
        the others as they were. KeyboardInterrupt and the like fail them too and are raised.
        Events of requests that another call of this engine waits for go to that call.
        """
        self._pump()
        events, self._unread = self._unread, []
        return events

    def collect(self, request_id: int) -> Iterator[Event]:
        """The events of one request until its last one, running steps as needed.

        Leaving the iterator early aborts the request.
        """
        mail = self._mail[request_id] = deque()
        try:
            while True:
                while not mail:
                    self._pump()
                event = mail.popleft()
                yield event
                if isinstance(event, RequestDone | RequestFailed):
                    return
        finally:
            del self._mail[request_id]
            self.abort(request_id)

    def run_to_end(self, request_ids: Items[int]) -> list[RequestDone | RequestFailed]:
        """Runs until these requests have ended; their last events, in the order given."""
        for number in request_ids:
            self._mail[number] = deque()
        ended: dict[int, RequestDone | RequestFailed] = {}
        try:
            while len(ended) < len(request_ids):
                self._pump()
                for number in request_ids:
                    for event in self._mail[number]:
                        if isinstance(event, RequestDone | RequestFailed):
                            ended[number] = event
                    self._mail[number].clear()
        finally:
            for number in request_ids:
                del self._mail[number]
                self.abort(number)
        return [ended[number] for number in request_ids]

    def _pump(self) -> None:
        for event in self._step():
            self._mail.get(event.request_id, self._unread).append(event)

    def _step(self) -> list[Event]:
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        try:
            return self._run(plan)
        except Exception as error:
            return [self._fail(s, error) for s in plan.sequences if s.request_id in self._requests]
        except BaseException as error:
            for sequence in plan.sequences:
                if sequence.request_id in self._requests:
                    self._fail(sequence, KelixError(f"the step was interrupted: {error!r}"))
            raise

    def _run(self, plan: StepPlan) -> list[Event]:
        if isinstance(plan, BlockPlan):
            return self._run_blocks(plan)
        if isinstance(plan, RenderPlan):
            return self._run_render(plan)
        return self._run_encode(plan)

    def _run_encode(self, plan: EncodePlan) -> list[Event]:
        for sequence in plan.sequences:
            ids = self.runner.run_encode(sequence)
            prompt = sequence.rows[: sequence.prompt_length]
            prompt[sequence.placed, : self.config.num_codes] = ids
            self.scheduler.encoded(sequence)
        return []

    def _run_blocks(self, plan: BlockPlan) -> list[Event]:
        events: list[Event] = []
        blocks = self.runner.run_blocks(plan)
        for sequence, block in blocks:
            if (block < 0).any():
                error = KelixError(
                    f"request {sequence.request_id}: the logits of block {sequence.generated} are "
                    "not finite; the weights or the prompt drive the model out of range"
                )
                events.append(self._fail(sequence, error))
        self.scheduler.advance(plan)
        for sequence, block in blocks:
            if sequence.request_id in self._requests:
                sequence.append(block)
                index = sequence.generated - 1
                events.append(BlockEvent(sequence.request_id, index, tuple(block.tolist())))
        for sequence in plan.sequences:
            if sequence.finish_reason is None or sequence.request_id not in self._requests:
                continue
            if sequence.draws:
                events += self._start_render(sequence)
            else:
                events.append(self._finish(sequence))
        return events

    def _start_render(self, sequence: Sequence) -> list[Event]:
        try:
            self.runner.start_render(sequence)
        except Exception as error:
            return [self._fail(sequence, error)]
        self.scheduler.start_render(sequence)
        return []

    def _run_render(self, plan: RenderPlan) -> list[Event]:
        events: list[Event] = []
        for sequence, (step, steps) in self.runner.run_render(plan):
            events.append(ImageProgress(sequence.request_id, step, steps))
            if step == steps:
                image = self.runner.finish_render(sequence)
                done = self._finish(sequence, image)
                assert done.output.image is not None
                events += [ImageDone(sequence.request_id, done.output.image), done]
        return events

    def _finish(self, sequence: Sequence, image: Any = None) -> RequestDone:
        self._remove(sequence)
        assert sequence.finish_reason is not None
        timings = sequence.timings()
        picture = None
        if image is not None:
            picture = ImageOutput(
                image, sequence.blocks, sequence.condition_length, sequence.noise_seed, timings
            )
        wanted = sequence.hidden_from == 0 and sequence.hidden_parts
        output = Output(
            sequence.request_id,
            sequence.blocks,
            sequence.finish_reason,
            sequence.usage(),
            timings,
            image=picture,
            hidden=self.runner.hidden(sequence) if wanted else None,
        )
        return RequestDone(sequence.request_id, output)

    def _fail(self, sequence: Sequence, error: Exception) -> RequestFailed:
        self._remove(sequence)
        return RequestFailed(sequence.request_id, error)

    def _remove(self, sequence: Sequence) -> None:
        del self._requests[sequence.request_id]
        self.scheduler.remove(sequence)
