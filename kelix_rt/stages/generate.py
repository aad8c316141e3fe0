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
    """Runs the language model over a batch; keeps no state of requests.

    verify_head: also compute the whole head of every ancestral block and count how often its
    most likely id is one that the restricted head does not look at. Slow; for checking a model.
    """

    def __init__(self, model: KelixLM, kv: PagedKV, verify_head: bool = False) -> None:
        self.model = model
        self.kv = kv
        self.verify_head = verify_head
        self._escapes = torch.zeros((), dtype=torch.int64, device=kv.k.device)

    @property
    def head_escapes(self) -> int:
        """Slots whose most likely id was not admissible, since the start; 0 unless verified."""
        return int(self._escapes)

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
                if self.verify_head and not reference:
                    self._escapes += self.model.count_head_escapes(
                        last[part], blocks.clamp(min=0)
                    ).sum()
                parts.append(blocks)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
