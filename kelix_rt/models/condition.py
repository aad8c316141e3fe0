"""From a generated image to the condition rows that the image de-tokenizer reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kelix_rt.errors import InputError


@dataclass(frozen=True)
class ConditionRows:
    """Which hidden states form a condition.

    positions: [n] int64 rows of the hidden states, not yet cut to the longest condition.
    start: row of vision_start. end: row of vision_end, None when the model never closed the image.
    """

    positions: Tensor
    start: int
    end: int | None

    @property
    def length(self) -> int:
        """Number of rows before any truncation."""
        return int(self.positions.shape[0])


def find_condition(
    ids: Tensor,
    prompt_len: int,
    vision_start: int,
    vision_end: int,
    text_vocab: int,
    max_length: int,
    special_tokens: bool = True,
) -> ConditionRows:
    """Rows of the hidden states between vision_start and vision_end, both included.

    ids: [T, N+1] int64, prompt and generated blocks. prompt_len: rows of the prompt, whose last is
    vision_start. The state AT a block's position is taken, so vision_end must have been fed
    (when it is the last block, that is one more step than the generation needs).
    special_tokens=False keeps only the rows whose block is visual (first id >= text_vocab).
    Without a vision_end the condition is what follows vision_start, at most max_length rows of
    those fed (all blocks but the last); special_tokens=False then filters them, as the release
    does, by the visual flags of the LAST rows of ids, which are not the same rows.

    Raises InputError when no vision_start stands at the prompt's end or after it.
    """
    first = ids[:, 0].tolist()
    begin = prompt_len - 1
    start = next((p for p in range(max(begin, 0), len(first)) if first[p] == vision_start), None)
    if start is None:
        raise InputError(
            f"condition: no vision_start (id {vision_start}) at or after row {begin} of "
            f"{len(first)} blocks; end the prompt with it"
        )
    end = next((p for p in range(start + 1, len(first)) if first[p] == vision_end), None)
    stop = min(start + max_length, len(first) - 1) if end is None else end + 1
    positions = torch.arange(start, stop, device=ids.device)
    if not special_tokens:
        flagged = ids[len(first) - positions.shape[0] :, 0] if end is None else ids[positions, 0]
        positions = positions[flagged >= text_vocab]
    return ConditionRows(positions, start, end)


def build_condition(
    hidden: Tensor, rows: ConditionRows, max_length: int
) -> tuple[Tensor, Tensor, int]:
    """Condition embeddings [M, D], mask [M] int64, and the length before truncation.

    hidden: [>= last row + 1, D] states before the final norm; M = max_length. Unused rows are 0.
    Raises InputError when a row of the condition was never fed to the backbone.
    """
    if rows.length and int(rows.positions.max()) >= hidden.shape[0]:
        raise InputError(
            f"condition: row {int(rows.positions.max())} has no hidden state (there are "
            f"{hidden.shape[0]}); feed the block to the backbone first"
        )
    valid = min(rows.length, max_length)
    embeds = hidden.new_zeros(max_length, hidden.shape[1])
    embeds[:valid] = hidden[rows.positions[:valid]]
    mask = torch.zeros(max_length, dtype=torch.int64, device=hidden.device)
    mask[:valid] = 1
    return embeds, mask, rows.length
