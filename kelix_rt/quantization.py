"""Weight-only quantisation: an int8 matrix and a float32 scale per row in place of a matrix.

Plain torch, so that weights can be planned and read without the native operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Weights made floating again at a time: what a CPU's cache holds; on a GPU, for few launches.
TILE, TILE_GPU = 1 << 20, 1 << 24


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 matrix and the float32 scales that stand for a floating matrix, row by row.

    weight: [O, I], finite. Returns [O, I] int8 in [-127, 127] and [O] float32, the row's largest
    magnitude / 127: ``q * scale`` is within half a scale of the weight. A row of zeros has scale 0.
    Works through the rows in parts, so that the peak is the result and a few MiB.
    """
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = weight.new_zeros(len(weight), dtype=torch.float32)
    if weight.numel() == 0:
        return codes, scale
    step = max(1, TILE // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        part = weight[rows].float()
        scale[rows] = part.abs().amax(1) / 127
        divisor = scale[rows].masked_fill(scale[rows] == 0, 1.0).unsqueeze(1)
        codes[rows] = (part / divisor).round_().clamp_(-127, 127)
    return codes, scale


def dequantize_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight * scale[:, None]`` rounded to dtype. weight: [O, I] int8; scale: [O] float32."""
    return (weight * scale.unsqueeze(1)).to(dtype)
