"""The running state of one request: its rows, how many of them are computed, when it ends."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kelix_rt.request import FinishReason, RenderParams, SamplingParams, Timings, Usage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EndRules:
    """First ids that end a request (not looked for in the first generated block).

    image_end: only for drawing: this id is fed to the model once, then the request goes on to the
    DiT; it counts in the first block too.
    """

    stop_ids: frozenset[int]
    max_blocks: int
    image_end: int | None = None


class Sequence:
    """One request in the block stage.

    rows: int64 [S + max_blocks, N+1], the prompt and then the generated blocks; `length` of them
    are known, `computed` of them have keys and values in pages (0 after preemption). `handle` is
    the page pool's number while the sequence holds pages. A sequence that must keep hidden states
    collects those of the rows from `hidden_from` on in `hidden_parts`.
    """

    def __init__(
        self,
        request_id: int,
        prompt_rows: np.ndarray,
        sampling: SamplingParams,
        seed: int,
        ends: EndRules,
        *,
        hidden_from: int | None = None,
        render: RenderParams | None = None,
    ) -> None:
        prompt_length, width = prompt_rows.shape
        self.request_id = request_id
        self.rows = np.empty((prompt_length + ends.max_blocks, width), dtype=np.int64)
        self.rows[:prompt_length] = prompt_rows
        self.prompt_length = prompt_length
        self.length = prompt_length
        self.computed = 0
        self.cached = 0
        self.preemptions = 0
        self.sampling = sampling
        self.table = sampling.table(width)
        self.seed = seed
        self.ends = ends
        self.hidden_from = hidden_from
        self.hidden_parts: list[Tensor] = []
        self.hidden_count = 0
        self.render = render
        self.placed: np.ndarray | None = None  # bool [S]: rows that are image placeholders
        # Not yet encoded: patches, grids, and what their codes may be found by.
        self.images: deque[tuple[Tensor, Tensor, bytes | None]] = deque()
        self._placed_rows = 0
        self.render_state: Any = None  # the render stage's own
        self.condition_length = 0
        self.handle: int | None = None
        self.finish_reason: FinishReason | None = None
        self.image_closed = False
        self.created = time.perf_counter()
        self.admitted = self.first_block = self.blocks_done = 0.0

    def place_image(self, ids: np.ndarray) -> None:
        """Puts ids [n, N] of the next image in place of its placeholders."""
        assert self.placed is not None
        first = self._placed_rows
        self._placed_rows += len(ids)
        places = np.flatnonzero(self.placed)[first : self._placed_rows]
        self.rows[places, : ids.shape[1]] = ids

    @property
    def pending(self) -> int:
        """Known rows that are not computed yet: 1 while decoding, more while prefilling."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        """Blocks produced so far."""
        return self.length - self.prompt_length

    @property
    def runs(self) -> bool:
        """Whether it is in the block stage and holds pages; not once it has ended."""
        return self.handle is not None

    @property
    def draws(self) -> bool:
        """Whether an image is rendered from the generated blocks."""
        return self.render is not None

    @property
    def max_positions(self) -> int:
        """Rows that are fed at most: the last block is fed only to close an image."""
        return self.prompt_length + self.ends.max_blocks - (0 if self.draws else 1)

    @property
    def blocks(self) -> np.ndarray:
        """Copy of the generated rows, int64 [n, N+1]."""
        return self.rows[self.prompt_length : self.length].copy()

    def wants_block(self, end: int) -> bool:
        """Whether a block follows once the rows before `end` are computed."""
        return end == self.length and not self.image_closed

    def room_for_drafts(self, drafts: np.ndarray) -> int:
        """How many guessed blocks [n, N+1] can follow so that none of them ends the request.

        The block drawn behind the last of them may: it is the one that counts up to max_blocks.
        """
        ending = [first == self.ends.image_end or first in self.ends.stop_ids
                  for first in drafts[:, 0].tolist()]  # fmt: skip
        harmless = ending.index(True) if True in ending else len(ending)
        return max(0, min(harmless, self.ends.max_blocks - self.generated - 1))

    def new_hidden(self, start: int, end: int) -> range:
        """Rows of start..end whose hidden states are wanted and not kept yet."""
        if self.hidden_from is None:
            return range(0)
        return range(min(max(start, self.hidden_from + self.hidden_count), end), end)

    def append(self, block: np.ndarray) -> None:
        """Adds a generated block [N+1]; sets finish_reason when it ends the block stage."""
        self.rows[self.length] = block
        self.length += 1
        if self.generated == 1:
            self.first_block = time.perf_counter()
        first = int(block[0])
        if first == self.ends.image_end:
            self.image_closed = True
        elif self.generated > 1 and first in self.ends.stop_ids:
            self.finish_reason = "stop"
        elif self.generated == self.ends.max_blocks:
            self.finish_reason = "length"

    def force(self, blocks: np.ndarray) -> None:
        """Takes known blocks [n, N+1] for the generated ones: an image that is given, closed."""
        self.rows[self.length : self.length + len(blocks)] = blocks
        self.length += len(blocks)
        self.image_closed = True

    def advance(self, count: int) -> None:
        """Marks `count` more rows as computed; a closed image ends once its end is fed."""
        self.computed += count
        if self.image_closed and self.computed == self.length:
            self.finish_reason = "stop"

    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(self.prompt_length, self.cached, self.generated, self.preemptions)

    def timings(self) -> Timings:
        """Seconds since the request was added."""
        now = time.perf_counter()
        blocks_done = self.blocks_done or now
        return Timings(
            queued=max(self.admitted - self.created, 0.0),
            first_block=max(self.first_block - self.created, 0.0),
            blocks=max(blocks_done - self.created, 0.0),
            render=now - blocks_done if self.draws else 0.0,
            total=now - self.created,
        )
