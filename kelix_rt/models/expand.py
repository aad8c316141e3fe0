"""From a prompt's ids to blocks of N+1 ids."""

from __future__ import annotations

import torch
from torch import Tensor

from kelix_rt.config import KelixConfig
from kelix_rt.errors import InputError


def expand_ids(ids: Tensor, image_ids: Tensor | None, config: KelixConfig) -> Tensor:
    """Prompt ids to blocks: [S] or [S, N+1] int64 -> [S, N+1] int64.

    A text id t becomes ``t Q .. Q``; the i-th image placeholder becomes row i of image_ids ([n, N]
    ids of the unified vocabulary) and Q. Blocks without a placeholder pass through; blocks with
    one anywhere are read by their first id alone. Raises InputError for other shapes or dtypes, ids
    outside the vocabulary, or a number of image rows other than that of the placeholders.
    """
    num_codes, total = config.num_codes, config.qwen_config.total_vocab
    placeholder = config.qwen_config.image_token_id
    _check_ids("ids", ids, total)
    marked = torch.zeros_like(ids, dtype=torch.bool) if placeholder is None else ids == placeholder
    if ids.dim() == 2 and ids.shape[1] == num_codes + 1:
        if not bool(marked.any()):
            _require_rows(image_ids, 0, num_codes)
            return ids
        ids, marked = ids[:, 0], marked[:, 0]
    if ids.dim() != 1:
        raise InputError(
            f"expand: ids must have shape [S] or [S, N+1={num_codes + 1}], got {list(ids.shape)}"
        )
    blocks = ids.new_full((ids.shape[0], num_codes + 1), config.block_end)
    blocks[:, 0] = ids
    rows = _require_rows(image_ids, int(marked.sum()), num_codes)
    if rows is not None:
        _check_ids("image_ids", rows, total)
        blocks[marked, :num_codes] = rows.to(ids.device)
    return blocks


def _check_ids(name: str, ids: Tensor, total: int) -> None:
    if ids.dtype != torch.int64:
        raise InputError(f"expand: {name} must be int64, got {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < total:
        raise InputError(
            f"expand: {name} must be in [0, {total}), got {int(ids.min())} .. {int(ids.max())}"
        )


def _require_rows(image_ids: Tensor | None, count: int, num_codes: int) -> Tensor | None:
    found = 0 if image_ids is None else image_ids.shape[0]
    if found != count:
        raise InputError(
            f"expand: image_ids must have one row per image placeholder, got {found} rows for "
            f"{count} placeholders"
        )
    if image_ids is not None and count and tuple(image_ids.shape) != (count, num_codes):
        raise InputError(
            f"expand: image_ids must have shape [n, N={num_codes}], got {list(image_ids.shape)}"
        )
    return image_ids if count else None
