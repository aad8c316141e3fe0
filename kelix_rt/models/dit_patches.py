"""Latent planes to patch tokens and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kelix_rt.errors import InputError


def patch_grid(latent: Tensor, channels: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a latent [B, channels, h, w]. InputError for other shapes."""
    if latent.dim() != 4 or latent.shape[1] != channels or 0 in latent.shape:
        raise InputError(f"latent must have shape [B, {channels}, h, w], got {list(latent.shape)}")
    height, width = latent.shape[2:]
    if height % patch or width % patch:
        raise InputError(
            f"latent height and width must be multiples of patch_size {patch}, got {height}x{width}"
        )
    return height // patch, width // patch


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
