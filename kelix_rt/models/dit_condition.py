"""What the image DiT keeps of a condition for all denoise steps: keys and values of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kelix_rt.errors import InputError
from kelix_rt.models.transfer import to_device


@dataclass(frozen=True)
class ConditionCache:
    """Cross-attention keys and values of a batch of conditions, valid tokens first.

    keys, values: one tensor [B, heads, L, D] per block. mask: [B, 1, 1, L] bool, True where a
    token is real, or None when all rows have L tokens. lengths: real tokens of each row.
    capacity, grid_length, image_size: the padded length, token count and side of the picture in
    pixels (None: the config's) that its positions were laid out for.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    lengths: tuple[int, ...]
    capacity: int
    grid_length: int
    image_size: int | None = None

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.lengths)


def merge_conditions(caches: Sequence[ConditionCache]) -> ConditionCache:
    """One cache with the rows of all `caches` in order; a single cache is returned as it is.

    Shorter rows are padded with zeros and masked. What the result says of positions is of the first
    cache: it describes no row's any more.
    """
    if len(caches) == 1:
        return caches[0]
    lengths = tuple(length for cache in caches for length in cache.lengths)
    longest = max(lengths)

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(p, (0, 0, 0, longest - p.shape[2])) for p in parts])

    depth = range(len(caches[0].keys))
    keys = tuple(join([cache.keys[i] for cache in caches]) for i in depth)
    values = tuple(join([cache.values[i] for cache in caches]) for i in depth)
    mask = length_mask(lengths, keys[0].device)
    first = caches[0]
    return replace(first, keys=keys, values=values, mask=mask, lengths=lengths)


def length_mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """[B, 1, 1, L] bool, True below each row's length; None when all lengths are equal."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    limits = to_device(lengths, device).view(-1, 1, 1, 1)
    return torch.arange(longest, device=device) < limits


@dataclass(frozen=True)
class PackedCondition:
    """Condition tokens with the masked ones dropped: tokens [B, L, K], zero past each length.

    index: [B, L] int64, the place each token had before; None when no row has a gap.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    index: Tensor | None
    capacity: int


def pack_condition(condition: Tensor, mask: Tensor | None, channels: int) -> PackedCondition:
    """Checks a condition and its mask and drops the masked tokens.

    condition: [B, L, K] or [B, 1, L, K]. mask: [B, L] or [B, 1, 1, L], non-zero = real, its batch
    dividing B (it is then repeated), or None for all real. Raises InputError for other shapes,
    rows without a real token, or real tokens that are not finite.
    """
    if condition.dim() == 4 and condition.shape[1] == 1:
        condition = condition.squeeze(1)
    if condition.dim() != 3 or condition.shape[-1] != channels or 0 in condition.shape:
        raise InputError(
            f"condition must have shape [B, L, {channels}] or [B, 1, L, {channels}] with B and L "
            f"above 0, got {list(condition.shape)}"
        )
    batch, capacity, _ = condition.shape
    real = _real_tokens(mask, batch, capacity, condition.device)
    lengths = tuple(int(n) for n in real.sum(1).tolist())
    if min(lengths) == 0:
        raise InputError(f"mask leaves no condition token in row {lengths.index(0)}")
    longest = max(lengths)
    inside = torch.arange(longest, device=condition.device) < real.sum(1, keepdim=True)
    if bool((real[:, :longest] == inside).all()):
        index, tokens = None, condition[:, :longest]
    else:
        index = torch.argsort((~real).to(torch.int8), dim=1, stable=True)[:, :longest]
        tokens = condition.gather(1, index.unsqueeze(-1).expand(-1, -1, condition.shape[-1]))
    tokens = torch.where(inside.unsqueeze(-1), tokens, 0)  # pads may hold anything, NaN included
    if not bool(torch.isfinite(tokens).all()):
        raise InputError("condition holds NaN or infinity in a token that the mask keeps")
    return PackedCondition(tokens, lengths, index, capacity)


def _real_tokens(mask: Tensor | None, batch: int, capacity: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(batch, capacity, dtype=torch.bool, device=device)
    flat = mask[:, 0, 0] if mask.dim() == 4 and mask.shape[1:3] == (1, 1) else mask
    fits = flat.dim() == 2 and flat.shape[1] == capacity and len(flat) > 0
    if not fits or batch % len(flat) != 0:
        raise InputError(
            f"mask must have shape [B, {capacity}] or [B, 1, 1, {capacity}] with B dividing "
            f"{batch}, got {list(mask.shape)}"
        )
    return (flat != 0).to(device).repeat(batch // len(flat), 1)
