"""The image autoencoder (DC-AE, diffusers' AutoencoderDC): loading and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kelix_rt.config import read_config
from kelix_rt.errors import ConfigError
from kelix_rt.weights import Checkpoint, Source, load_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderDC


def load_vae(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderDC:
    """The autoencoder of a local directory, in eval mode; dtype None keeps the stored one.

    Raises ConfigError, or WeightError for tensors that are missing, misshapen or not finite.
    """
    from diffusers import AutoencoderDC

    config = read_config(path)
    if not isinstance(config, dict) or config["_class_name"] != AutoencoderDC.__name__:
        raise ConfigError(f"load_vae: {path} must hold the config of an AutoencoderDC")
    with torch.device("meta"):
        vae = AutoencoderDC.from_config(config)
    mapping = {name: Source((name,)) for name in vae.state_dict()}
    load_weights(vae, Checkpoint(path), mapping, device=device, dtype=dtype)
    return vae.eval().requires_grad_(False)


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
