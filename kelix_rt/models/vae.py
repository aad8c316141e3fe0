"""The image autoencoder (DC-AE, diffusers' AutoencoderDC): loading and decoding."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kelix_rt.config import read_config
from kelix_rt.errors import ConfigError
from kelix_rt.models.products import Float32Products, are_native
from kelix_rt.weights import Checkpoint, Source, load_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderDC


class Autoencoder:
    """The autoencoder of a local directory. Its config is read and its files are opened at once;
    diffusers, whose import takes seconds, and the weights come with the first use of `module`.

    dtype None keeps the stored one. encoder: False leaves it out, half of the weights,
    of which drawing uses none. Raises ConfigError for another config, WeightError for files
    that are missing or no checkpoint.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        encoder: bool = False,
    ) -> None:
        config = read_config(path)
        if not isinstance(config, dict) or config["_class_name"] != "AutoencoderDC":
            raise ConfigError(f"Autoencoder: {path} must hold the config of an AutoencoderDC")
        self.config: dict[str, Any] = config
        self._checkpoint = Checkpoint(path)
        self._device, self._dtype, self._encoder = device, dtype, encoder

    @classmethod
    def of(cls, module: AutoencoderDC) -> Autoencoder:
        """The same around a model that is loaded."""
        made = cls.__new__(cls)
        made.config, made.module = dict(module.config), module
        return made

    @property
    def rate(self) -> int:
        """Pixels of one latent position along each side."""
        return int(2 ** (len(self.config["decoder_block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.config["latent_channels"])

    @cached_property
    def module(self) -> AutoencoderDC:
        """The loaded model, in eval mode. Raises WeightError for tensors that are missing,
        misshapen or not finite."""
        from diffusers import AutoencoderDC

        with torch.device("meta"):
            vae = AutoencoderDC.from_config(self.config)
        if not self._encoder:
            del vae.encoder
        mapping = {name: Source((name,)) for name in vae.state_dict()}
        load_weights(
            vae,
            self._checkpoint,
            mapping,
            device=self._device,
            dtype=self._dtype,
            unused=(r"encoder\..*",),
        )
        return vae.eval().requires_grad_(False)


def load_vae(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderDC:
    """The loaded autoencoder of a local directory, whole; arguments and errors as `Autoencoder`."""
    return Autoencoder(path, device, dtype, encoder=True).module


@torch.no_grad()
def decode(vae: AutoencoderDC, latent: Tensor) -> Tensor:
    """Latents [B, C, h, w] of the DiT's scale -> pixels [B, 3, H, W] float32, about -1..1."""
    scaled = latent.float() / vae.config.scaling_factor
    native = are_native(vae.dtype, vae.device)
    with nullcontext() if native else Float32Products():
        pixels: Tensor = vae.decode(scaled.to(vae.dtype)).sample.float()
    return pixels


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] -> [B, H, W, 3] uint8: clamped, halves rounded to even, in float32."""
    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
