"""The encode stage: image patches -> visual codes and their ids in the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kelix_rt.errors import InputError
from kelix_rt.models import vision_layout
from kelix_rt.models.vision_layout import MERGE, read_grids
from kelix_rt.stages.code_cache import CodeCache, content_key

if TYPE_CHECKING:
    from kelix_rt.config import VisionConfig
    from kelix_rt.models.vision_tokenizer import VisionTokenizer


def block_count(grid: Tensor) -> int:
    """Number of visual blocks of grids [n, 3] of (frames, rows, columns) patches."""
    return int((grid[:, 0] * (grid[:, 1] // MERGE) * (grid[:, 2] // MERGE)).sum())


def split_images(pixel_values: Tensor, grid: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Patches and grid [1, 3] of each image of packed patches that `check_patches` let pass."""
    return list(zip(pixel_values.split(grid.prod(dim=1).tolist()), grid.split(1), strict=True))


def check_patches(pixel_values: Tensor, grid: Tensor, vision: VisionConfig) -> None:
    """Raises InputError unless patches [N, C, P, P] and grids [n, 3] belong together, are what the
    encoder takes, and finite."""
    vision_layout.check_patches(
        pixel_values, read_grids(grid), vision.num_channels, vision.patch_size
    )
    if not bool(torch.isfinite(pixel_values).all()):
        raise InputError("pixel_values must be finite, got NaN or infinity")


class EncodeStage:
    """Runs the vision tokenizer; one call encodes any number of images.

    cache_bytes: what codes of images seen before may take; 0 keeps none.
    """

    def __init__(
        self,
        tokenizer: VisionTokenizer,
        text_vocab: int,
        mode: Literal["reference", "exact"] = "reference",
        cache_bytes: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_vocab = text_vocab
        self.mode = mode
        self.cache = CodeCache(cache_bytes)

    @torch.inference_mode()
    def codes(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """Codes int64 [T, N] local to their sub-codebooks; T counts the blocks of all images."""
        check_patches(pixel_values, grid, self.tokenizer.config.vision_config)
        parameter = next(self.tokenizer.parameters())
        pixels = pixel_values.to(device=parameter.device, dtype=parameter.dtype)
        return self.tokenizer.encode(pixels, grid, mode=self.mode)

    def key(self, pixel_values: Tensor, grid: Tensor) -> bytes | None:
        """What the codes of one image are found by; None where none are kept."""
        return content_key(pixel_values, grid) if self.cache.max_bytes else None

    def cached_codes(
        self, pixel_values: Tensor, grid: Tensor, key: bytes | None = None
    ) -> tuple[Tensor, bool]:
        """Codes of one image, of grid [1, 3], and whether the tokenizer had to run for them.

        key: what `key` gives, if it was made before. Codes that are known come from the CPU.
        """
        key = key or self.key(pixel_values, grid)
        if key is None:
            return self.codes(pixel_values, grid), True
        codes = self.cache.get(key)
        if codes is not None:
            return codes, False
        codes = self.codes(pixel_values, grid)
        self.cache.put(key, codes)
        return codes, True

    @torch.inference_mode()
    def ids(self, codes: Tensor) -> Tensor:
        """Codes [T, N] as ids of the language model, int64 [T, N]."""
        return self.tokenizer.global_ids(codes, self.text_vocab)
