"""The image autoencoder (DC-AE, diffusers' AutoencoderDC): loading and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kelix_rt.errors import WeightError

if TYPE_CHECKING:
    from diffusers import AutoencoderDC


def load_vae(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderDC:
    """The autoencoder of a local directory, in eval mode; dtype None is float32.

    Raises WeightError when the checkpoint lacks tensors (diffusers would leave them random).
    """
    from diffusers import AutoencoderDC

    vae, report = AutoencoderDC.from_pretrained(
        str(path),
        torch_dtype=dtype,
        local_files_only=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise WeightError(f"{path}: the autoencoder lacks {sorted(report['missing_keys'])}")
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def decode(vae: AutoencoderDC, latent: Tensor) -> Tensor:
    """Latents [B, C, h, w] of the DiT's scale -> pixels [B, 3, H, W] float32, about -1..1."""
    scaled = latent.float() / vae.config.scaling_factor
    pixels: Tensor = vae.decode(scaled.to(vae.dtype)).sample.float()
    return pixels


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] -> [B, H, W, 3] uint8: clamped, halves rounded to even, in float32."""
    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
