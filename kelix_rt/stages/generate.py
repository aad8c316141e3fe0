"""The block stage: one packed forward over prompt chunks and decoding rows, then their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kelix_rt.models.backbone import PagedKV, StepContext
    from kelix_rt.models.language_model import KelixLM


@dataclass(frozen=True)
class BlockBatch:
    """The tensors of one block step, on the model's device.

    ids: int64 [T, N+1], the rows of all requests one after another. context: where they stand.
    block_rows: int64 [R], rows of `ids` that are followed by a new block; the first
    `num_ancestral` of them are drawn ancestrally, the rest by the release's rule.
    params: float32 [R, N+1, 4]; seeds, steps: int64 [R]. keep_rows: int64 [K], rows whose hidden
    state is kept.
    """

    ids: Tensor
    context: StepContext
    block_rows: Tensor
    params: Tensor
    seeds: Tensor
    steps: Tensor
    keep_rows: Tensor
    num_ancestral: int


@dataclass(frozen=True)
class BlockResult:
    """blocks: int64 [R, N+1], -1 where the logits were not numbers. hidden: [K, D] or None."""

    blocks: Tensor
    hidden: Tensor | None


class GenerateStage:
    """Runs the language model over a batch; keeps no state of requests."""

    def __init__(self, model: KelixLM, kv: PagedKV) -> None:
        self.model = model
        self.kv = kv

    @torch.inference_mode()
    def step(self, batch: BlockBatch) -> BlockResult:
        """Computes the rows, writes their keys and values, draws the wanted blocks.

        Launches work only: nothing here waits for the device.
        """
        hidden = self.model.forward(batch.ids, batch.context, self.kv)
        kept = hidden.index_select(0, batch.keep_rows) if len(batch.keep_rows) else None
        if not len(batch.block_rows):
            return BlockResult(batch.ids[:0], kept)
        last = hidden.index_select(0, batch.block_rows)
        return BlockResult(self._decode(last, batch), kept)

    def _decode(self, last: Tensor, batch: BlockBatch) -> Tensor:
        cut, rows = batch.num_ancestral, len(batch.block_rows)
        parts = []
        for part, reference in ((slice(0, cut), False), (slice(cut, rows), True)):
            if part.start < part.stop:
                blocks, _ = self.model.decode_blocks(
                    last[part],
                    batch.params[part],
                    batch.seeds[part],
                    batch.steps[part],
                    reference=reference,
                )
                parts.append(blocks)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
