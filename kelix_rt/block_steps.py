"""Block steps in two halves: launch one, and read its blocks once the device has drawn them.

Between the two the host is free, and a second step may be launched: rows that the first one draws
go to it on the device, so the host need not know them. Results wait in memory of the host that two
steps use in turn, so no more than two may be unread.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kelix_rt.plans import BlockPlan, Span
from kelix_rt.sequence import Sequence
from kelix_rt.speculation import accepted_drafts
from kelix_rt.step_layout import block_rows

if TYPE_CHECKING:
    from kelix_rt.batch import StepBuffer
    from kelix_rt.device_queue import DeviceQueue, Mark
    from kelix_rt.graphs import DecodeGraphs
    from kelix_rt.stages.generate import GenerateStage

Drawn = list[tuple[Span, np.ndarray]]


class Flight:
    """A step that was launched.

    drawn: its spans that yield blocks, in the order of the blocks' rows. kept: spans, and how many
    hidden states of each are kept. blocks, hidden: on the device, once the step has run there.
    """

    blocks: Tensor
    hidden: Tensor | None = None
    mark: Mark

    def __init__(
        self, plan: BlockPlan, drawn: list[Span], kept: list[tuple[Span, int]], host: Tensor
    ) -> None:
        self.plan = plan
        self.drawn = drawn
        self.kept = kept
        self.host = host
        self._rows: dict[Sequence, int] = {}
        for row, span in enumerate(drawn):
            self._rows[span.sequence] = row

    def row_of(self, sequence: Sequence) -> int:
        """The row of `blocks` that a sequence gets; for a step without drafts."""
        return self._rows[sequence]


class BlockSteps:
    """Launches the steps of one engine on its device and reads what they drew."""

    def __init__(
        self,
        stage: GenerateStage,
        buffer: StepBuffer,
        graphs: DecodeGraphs,
        queue: DeviceQueue,
        max_batch: int,
    ) -> None:
        self._stage = stage
        self._buffer = buffer
        self._graphs = graphs
        self._queue = queue
        shape = (block_rows(max_batch), buffer.width)
        self._results = cycle([queue.host_zeros(*shape, dtype=torch.int64) for _ in range(2)])

    def launch(self, plan: BlockPlan, after: Flight | None = None) -> Flight:
        """Hands the step to the device. after: the one in front, which draws the unread rows."""
        bucket = self._graphs.choose(plan)
        batch, drawn, kept = self._buffer.pack(plan, bucket, after)
        count = sum(span.num_blocks for span in drawn)
        flight = Flight(plan, drawn, kept, next(self._results)[:count])

        def work() -> None:
            result = self._stage.step(batch) if bucket is None else self._graphs.replay(bucket)
            flight.blocks = result.blocks[:count]
            flight.host.copy_(flight.blocks, non_blocking=True)
            if kept:
                assert result.hidden is not None
                # Of a replay: out of the rows of padding, and of memory that the next overwrites.
                held = result.hidden[: sum(rows for _, rows in kept)]
                flight.hidden = held if bucket is None else held.clone()

        self._queue.run(work)
        flight.mark = self._queue.mark()
        return flight

    def read(self, flight: Flight) -> Drawn:
        """Waits for a step; the spans that got blocks, and those int64 [1 + n, N+1].

        n counts the drafts that were accepted, which the model's own block follows. The blocks hold
        until the step after the next one. Requests that ended meanwhile are left out. The only wait
        for the device, and none for a step that draws and keeps nothing.
        """
        if flight.drawn or flight.kept:
            flight.mark.wait()
        blocks = flight.host.numpy()
        found: dict[Span, np.ndarray] = {}
        row = 0
        for span in flight.drawn:
            if span.sequence.runs:
                found[span] = _checked(span, blocks[row : row + span.num_blocks])
            row += span.num_blocks
        self._keep(flight, found)
        return list(found.items())

    def _keep(self, flight: Flight, found: dict[Span, np.ndarray]) -> None:
        """Gives the requests the hidden states they keep, but for those of rejected drafts."""
        if flight.hidden is None:
            return
        parts = flight.hidden.split([count for _, count in flight.kept])
        for (span, count), part in zip(flight.kept, parts, strict=True):
            if not span.sequence.runs:
                continue
            rejected = span.num_blocks - len(found[span]) if span.drafts else 0
            span.sequence.hidden_parts.append(part[: count - rejected])
            span.sequence.hidden_count += count - rejected


def _checked(span: Span, blocks: np.ndarray) -> np.ndarray:
    """What holds of a span's blocks [1 + drafts, N+1]: up to the first that was not guessed."""
    known = span.sequence.length
    drafts = span.sequence.rows[known : known + span.drafts]
    return blocks[: 1 + accepted_drafts(drafts, blocks)]
