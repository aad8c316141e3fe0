"""Packs a block step into one host buffer and moves it to the device in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kelix_rt.models.backbone import StepContext
from kelix_rt.plans import BlockPlan, Span
from kelix_rt.stages.generate import BlockBatch
from kelix_rt.step_layout import aligned_bytes, buffer_bytes, sections

if TYPE_CHECKING:
    from kelix_rt._host import PagePool
    from kelix_rt.block_steps import Flight
    from kelix_rt.device_queue import DeviceQueue, Mark

MAX_LAYOUTS = 256
_DTYPES: dict[type, torch.dtype] = {
    np.int64: torch.int64,
    np.int32: torch.int32,
    np.float32: torch.float32,
}


@dataclass(frozen=True)
class _Layout:
    """Views of one combination of sizes: numpy on the host buffer, torch on the device buffer.

    carried: int64 [2, spans], rows of the step in front and the rows of `batch.ids` they become.
    """

    used: int
    host: dict[str, np.ndarray]
    batch: BlockBatch
    carried: Tensor


class StepBuffer:
    """Reusable buffers of the block steps of one engine.

    The tensors of a batch are views at fixed addresses that depend on its sizes only; they hold
    until the next pack() or pad(). On a CPU host and device buffer are the same memory.
    max_rows: the most requests of a step.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_tokens: int,
        max_batch: int,
        max_positions: int,
        queue: DeviceQueue,
    ) -> None:
        self.pool = pool
        self.width = pool.row_width
        pages = -(-max_positions // pool.page_size)
        capacity = buffer_bytes(self.width, max_tokens, max_batch, pages)
        self.max_rows = min(max_batch, max_tokens)
        self._pages = min(pages, pool.num_pages)
        self._queue = queue
        self._host = queue.host_zeros(capacity, dtype=torch.uint8)
        shared = queue.shares_memory
        self._device = self._host if shared else torch.zeros_like(self._host, device=queue.device)
        self._copied: Mark | None = None
        self._layouts: dict[tuple[int, ...], _Layout] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._device.numel()

    def pack(
        self, plan: BlockPlan, padded: int | None = None, after: Flight | None = None
    ) -> tuple[BlockBatch, list[Span], list[tuple[Span, int]]]:
        """The batch of a plan, the spans in the order of its block rows, and what is kept.

        A span has `num_blocks` block rows, one after another. The last value pairs spans with
        their number of kept hidden rows, in order. padded: for a plan of one row per request, the
        number of rows, requests, blocks and kept rows that the batch has in any case, the plan's
        own coming first. after: the step that draws the plan's unread rows.
        """
        self._wait()
        spans = plan.spans
        drawn = [s for s in spans if s.wants_block and s.sequence.sampling.rule == "ancestral"]
        ancestral = sum(span.num_blocks for span in drawn)
        drawn += [s for s in spans if s.wants_block and s.sequence.sampling.rule == "reference"]
        keeps = [span.sequence.new_hidden(span.start, span.end) for span in spans]
        if padded is None:
            total = sum(span.count for span in spans)
            kept = sum(len(keep) for keep in keeps)
            # Not the rows of this step: a rejected draft may have left a request a page more.
            held = (s.sequence.handle for s in spans)
            rows = max(self.pool.num_rows(handle) for handle in held if handle is not None)
            width = -(-rows // self.pool.page_size)
            blocks = sum(span.num_blocks for span in drawn)
            layout = self._layout(total, len(spans), blocks, kept, width, ancestral)
        else:
            layout = self._padding(padded, len(spans))
        self._fill(layout.host, spans, drawn, keeps)
        carried = self._fill_carried(layout.host, spans, after)
        self._upload(layout)
        if after is not None and carried:
            self._carry(layout, carried, after)
        kept_spans = [(span, len(keep)) for span, keep in zip(spans, keeps, strict=True) if keep]
        return layout.batch, drawn, kept_spans

    def pad(self, rows: int) -> BlockBatch:
        """A batch of that many rows of no request: nothing is stored, attended or kept.

        Its tensors are those of every batch that is padded to as many rows.
        """
        self._wait()
        layout = self._padding(rows, 0)
        self._upload(layout)
        return layout.batch

    def _wait(self) -> None:
        """Until the copy of the step before has left the host buffer."""
        if self._copied is not None:
            self._copied.wait()

    def _upload(self, layout: _Layout) -> None:
        if self._queue.shares_memory:
            return
        target, source = self._device[: layout.used], self._host[: layout.used]
        self._queue.run(lambda: target.copy_(source, non_blocking=True))
        self._copied = self._queue.mark()

    def _carry(self, layout: _Layout, count: int, after: Flight) -> None:
        """Copies rows that the step in front draws into the batch, on the device."""
        ids, source, target = (layout.batch.ids, *layout.carried[:, :count])

        def work() -> None:
            # Of logits that were not numbers come ids of -1; nobody will look at what follows them.
            rows = after.blocks.index_select(0, source).clamp_(min=0)
            ids.index_copy_(0, target, rows)

        self._queue.run(work)

    def _padding(self, rows: int, used: int) -> _Layout:
        """The layout of a padded batch, all rows but the first `used` doing nothing."""
        layout = self._layout(rows, rows, rows, rows, self._pages, rows)
        for name, values in layout.host.items():
            values[used if name == "page_table" else 0 :] = 0
        layout.host["slots"][:] = -1
        layout.host["query_start"][:] = np.arange(rows + 1)
        return layout

    def _fill(
        self,
        host: dict[str, np.ndarray],
        spans: tuple[Span, ...],
        drawn: list[Span],
        keeps: list[range],
    ) -> None:
        ids, positions, query_start = host["ids"], host["positions"], host["query_start"]
        context_lens, keep_rows = host["context_lens"], host["keep_rows"]
        row_after: dict[Span, int] = {}
        row = kept = 0
        for index, (span, keep) in enumerate(zip(spans, keeps, strict=True)):
            end, stop = row + span.count, span.end
            ids[row:end] = 0 if span.unread else span.sequence.rows[span.start : stop]
            positions[row:end] = span.start if span.count == 1 else np.arange(span.start, stop)
            query_start[index] = row
            context_lens[index] = stop
            if keep:
                first = row + keep.start - span.start
                keep_rows[kept : kept + len(keep)] = np.arange(first, first + len(keep))
                kept += len(keep)
            row = end
            row_after[span] = row
        query_start[len(spans)] = row

        table, page = host["page_table"][: len(spans)], self.pool.page_size
        handles = [span.sequence.handle for span in spans if span.sequence.handle is not None]
        self.pool.write_page_tables(handles, table)
        owners = np.repeat(np.arange(len(spans)), [span.count for span in spans])
        slots = table[owners, positions[:row] // page].astype(np.int64) * page
        host["slots"][:row] = slots + positions[:row] % page

        first = 0
        for span in drawn:
            sequence, part = span.sequence, slice(first, first + span.num_blocks)
            behind = np.arange(span.num_blocks)  # a draft's block is that many after the next one
            host["block_rows"][part] = row_after[span] - span.num_blocks + behind
            host["params"][part] = sequence.table
            host["seeds"][part] = sequence.seed
            first_step = span.end - span.drafts - sequence.prompt_length
            host["steps"][part] = first_step + behind
            first = part.stop

    def _fill_carried(
        self, host: dict[str, np.ndarray], spans: tuple[Span, ...], after: Flight | None
    ) -> int:
        """Notes which rows of the step in front become which rows of the batch; how many."""
        unread = [(i, span.sequence) for i, span in enumerate(spans) if span.unread]
        if after is not None and unread:
            targets, sequences = zip(*unread, strict=True)
            host["carried"][0, : len(unread)] = [after.row_of(one) for one in sequences]
            host["carried"][1, : len(unread)] = host["query_start"][list(targets)]
        return len(unread)

    def _layout(self, *key: int) -> _Layout:
        found = self._layouts.get(key)
        if found is not None:
            return found
        if len(self._layouts) >= MAX_LAYOUTS:
            self._layouts.clear()
        host: dict[str, np.ndarray] = {}
        device: dict[str, Tensor] = {}
        offset = 0
        for name, (dtype, shape) in sections(self.width, *key[:5]).items():
            used = int(np.prod(shape)) * np.dtype(dtype).itemsize
            part = slice(offset, offset + used)
            host[name] = self._host.numpy()[part].view(dtype).reshape(shape)
            device[name] = self._device[part].view(_DTYPES[dtype]).view(shape)
            offset += aligned_bytes(dtype, shape)
        context = StepContext(
            positions=device["positions"],
            slots=device["slots"],
            page_table=device["page_table"],
            context_lens=device["context_lens"],
            query_start=device["query_start"],
        )
        batch = BlockBatch(
            ids=device["ids"],
            context=context,
            block_rows=device["block_rows"],
            params=device["params"],
            seeds=device["seeds"],
            steps=device["steps"],
            keep_rows=device["keep_rows"],
            num_ancestral=key[5],
        )
        layout = _Layout(offset, host, batch, device["carried"])
        self._layouts[key] = layout
        return layout
