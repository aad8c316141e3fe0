"""Latent planes to patch tokens and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patchify(latent: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] -> [B, (h / patch) * (w / patch), C * patch * patch], (C, row, column) order.

    These are the windows of a convolution with kernel = stride = patch, so that its weight is the
    matrix of a Linear. Odd kernels are padded by half their size, which shifts their windows.
    """
    if patch == 1:
        return latent.flatten(2).transpose(1, 2)
    height, width = latent.shape[2:]
    if patch % 2:
        half = patch // 2
        latent = F.pad(latent, (half, 0, half, 0))[:, :, :height, :width]
    return F.unfold(latent, kernel_size=patch, stride=patch).transpose(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int, channels: int) -> Tensor:
    """[B, h * w, patch * patch * channels], channel fastest -> [B, channels, h * p, w * p]."""
    cells = tokens.unflatten(1, grid).unflatten(-1, (patch, patch, channels))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
