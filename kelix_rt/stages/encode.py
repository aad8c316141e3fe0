"""The encode stage: image patches -> visual codes and their ids in the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kelix_rt.errors import InputError
from kelix_rt.models.vision_layout import MERGE, read_grids

if TYPE_CHECKING:
    from kelix_rt.models.vision_tokenizer import VisionTokenizer


def block_count(grid: Tensor) -> int:
    """Number of visual blocks of grids [n, 3] of (frames, rows, columns) patches."""
    return int((grid[:, 0] * (grid[:, 1] // MERGE) * (grid[:, 2] // MERGE)).sum())


def check_patches(pixel_values: Tensor, grid: Tensor) -> None:
    """Raises InputError unless patches [N, 3, P, P] and grids [n, 3] belong together."""
    read_grids(grid)
    patches = int(grid.prod(dim=1).sum())
    if pixel_values.ndim != 4 or pixel_values.shape[0] != patches:
        raise InputError(
            f"pixel_values must have shape [{patches}, channels, patch, patch] for grids "
            f"{grid.tolist()}, got {list(pixel_values.shape)}"
        )
    if not bool(torch.isfinite(pixel_values).all()):
        raise InputError("pixel_values must be finite, got NaN or infinity")


class EncodeStage:
    """Runs the vision tokenizer; one call encodes any number of images."""

    def __init__(
        self,
        tokenizer: VisionTokenizer,
        text_vocab: int,
        mode: Literal["exact", "reference"] = "exact",
    ) -> None:
        self.tokenizer = tokenizer
        self.text_vocab = text_vocab
        self.mode = mode

    @torch.inference_mode()
    def codes(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """Codes int64 [T, N] local to their sub-codebooks; T counts the blocks of all images."""
        check_patches(pixel_values, grid)
        parameter = next(self.tokenizer.parameters())
        pixels = pixel_values.to(device=parameter.device, dtype=parameter.dtype)
        return self.tokenizer.encode(pixels, grid, mode=self.mode)

    @torch.inference_mode()
    def image_ids(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """The same codes as ids of the language model, int64 [T, N]."""
        return self.tokenizer.global_ids(self.codes(pixel_values, grid), self.text_vocab)
