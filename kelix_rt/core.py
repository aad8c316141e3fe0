"""Requests into the loop: every check happens here, before anything is queued."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kelix_rt.calls import Calls
from kelix_rt.errors import InputError
from kelix_rt.intake import (
    derive_seed,
    drawing_prompt,
    end_rules,
    patch_tensors,
    prompt_rows,
)
from kelix_rt.request import GREEDY_DRAWING, Prompt, RenderParams, SamplingParams
from kelix_rt.scheduler import Scheduler
from kelix_rt.sequence import EndRules, Sequence
from kelix_rt.stages.encode import split_images

if TYPE_CHECKING:
    from kelix_rt.config import EngineConfig
    from kelix_rt.runner import Runner


class EngineCore(Calls):
    """The engine for embedders: add_request, step, abort."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        options: EngineConfig,
        max_positions: int,
    ) -> None:
        super().__init__(runner, scheduler)
        self.options = options
        self.max_positions = max_positions
        self._counter = 0

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
        number = self._counter
        sequence = self._build(number, prompt, sampling, render, return_hidden)
        self._counter += 1
        return self.submit(sequence)

    def _add_later(self, make: Callable[[], Prompt], sampling: SamplingParams | None) -> int:
        """Queues a request whose prompt is a job, and returns its number.

        Whatever add_request would raise of the prompt is the error of its RequestFailed.
        """
        _check_type("sampling", sampling, SamplingParams)
        _ = self.runner  # refuses while it sleeps; with a job unfinished it stays awake
        number, begin = self._counter, time.perf_counter()
        self._counter += 1

        def built() -> Sequence:
            sequence = self._build(number, make(), sampling, None, False)
            sequence.created = begin
            return sequence

        self._jobs.start(number, built, self.submit)
        return number

    def _build(
        self,
        number: int,
        prompt: Prompt | Items[int] | np.ndarray | Tensor,
        sampling: SamplingParams | None,
        render: RenderParams | None,
        return_hidden: bool,
    ) -> Sequence:
        """The checked request; changes nothing."""
        _check_type("sampling", sampling, SamplingParams)
        _check_type("render", render, RenderParams)
        if render is not None:
            render = self.runner.render_stage().sized(render)
        prompt, rows, placed = self._read(prompt, draw=render is not None)
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
        sequence = self._sequence(number, rows, sampling, ends, hidden_from, render)
        self._place_images(sequence, prompt, placed)
        return sequence

    def add_forced_image(self, prompt: Any, blocks: np.ndarray, render: RenderParams) -> int:
        """Queues the drawing of an image whose blocks [n, N+1] are known, see
        `Runner.image_blocks`; errors as add_request."""
        render = self.runner.render_stage().sized(render)
        prompt, rows, placed = self._read(prompt, draw=True)
        longest = min(self.options.max_condition_length - 1, self.max_positions - len(rows))
        if len(blocks) > longest:
            raise InputError(
                f"reconstruct: an image of {len(blocks) - 1} blocks does not fit, there is room "
                f"for {longest - 1}; encode it at a smaller size"
            )
        ends = EndRules(frozenset(), len(blocks), self.config.qwen_config.vision_end_token_id)
        sequence = self._sequence(self._counter, rows, GREEDY_DRAWING, ends, len(rows) - 1, render)
        self._place_images(sequence, prompt, placed)
        sequence.force(blocks)
        self._counter += 1
        return self.submit(sequence)

    def _read(
        self, prompt: Prompt | Items[int] | np.ndarray | Tensor, *, draw: bool
    ) -> tuple[Prompt, np.ndarray, np.ndarray]:
        """The checked prompt, and what `prompt_rows` makes of it."""
        prompt = patch_tensors(prompt if isinstance(prompt, Prompt) else Prompt(prompt))
        if draw:
            prompt = drawing_prompt(prompt, self.config)
        return prompt, *prompt_rows(prompt, self.config, self.runner.model.expand)

    def _place_images(self, sequence: Sequence, prompt: Prompt, placed: np.ndarray) -> None:
        """Says which rows stand for images, and which images are still to be encoded."""
        sequence.placed = placed
        if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
            key = self.runner.encode_stage().key
            for image in split_images(prompt.pixel_values, prompt.image_grid_thw):
                sequence.images.append((*image, key(*image)))

    def _sequence(
        self,
        number: int,
        rows: np.ndarray,
        sampling: SamplingParams,
        ends: EndRules,
        hidden_from: int | None,
        render: RenderParams | None,
    ) -> Sequence:
        seed = derive_seed(self.options.seed, number) if sampling.seed is None else sampling.seed
        if render is not None and render.seed is None:
            render = replace(render, seed=derive_seed(seed, 0))
        return Sequence(number, rows, sampling, seed, ends, hidden_from=hidden_from, render=render)


def _check_type(name: str, value: object, expected: type) -> None:
    if value is not None and not isinstance(value, expected):
        raise InputError(f"{name} must be {expected.__name__} or None, got {value!r}")
