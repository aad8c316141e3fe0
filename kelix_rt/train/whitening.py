"""Latents whose directions weigh alike, folded into the weights of a trained autoencoder.

Most of a latent's variance is the brightness of the background: in the directions that tell shapes
and letters apart it is a hundredth of that. The DiT's loss weighs all alike, and its noise drowns
the small ones first. So the latents are whitened, as whoever trains on them would otherwise have to
do: by one matrix behind the encoder and its inverse in front of the decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

FLATTEST = 1e-4  # share of the mean variance below which a direction is taken to have that much


@torch.no_grad()
def whiten(vae: AutoencoderDC, latents: Tensor) -> None:
    """Gives the latents [B, C, h, w] the identity as covariance; pictures come back as before.

    latents: what `vae.encode` makes of some pictures. Directions that hardly vary (`FLATTEST`) keep
    less than a variance of 1. Means are not taken off, because the decoder pads latents with zeros.
    Linear algebra is float64 on the CPU.
    """
    values = latents.double().cpu().movedim(1, 0).flatten(1)
    variances, directions = torch.linalg.eigh(torch.cov(values))
    variances = variances.clamp_min(FLATTEST * float(variances.mean()))
    forth = directions @ torch.diag(variances.rsqrt()) @ directions.T
    back = directions @ torch.diag(variances.sqrt()) @ directions.T
    _after(vae.encoder, forth)
    _before(vae.decoder, back)


def _after(encoder: Any, matrix: Tensor) -> None:
    """Encoder -> matrix @ encoder. Its shortcut, means of neighbouring channels, has no weights:
    what the matrix changes about it goes into the middle of the last convolution."""
    conv = encoder.conv_out
    weight, bias = conv.weight.double().cpu(), conv.bias.double().cpu()
    changed = torch.einsum("oj,jihw->oihw", matrix, weight)
    if encoder.out_shortcut:
        group = encoder.out_shortcut_average_group_size
        shortcut = torch.eye(len(matrix)).double().repeat_interleave(group, dim=1) / group
        changed[:, :, 1, 1] += matrix @ shortcut - shortcut
    conv.weight.copy_(changed)
    conv.bias.copy_(matrix @ bias)


def _before(decoder: Any, matrix: Tensor) -> None:
    """Decoder -> decoder @ matrix; its shortcut repeats channels."""
    conv = decoder.conv_in
    changed = torch.einsum("ojhw,ji->oihw", conv.weight.double().cpu(), matrix)
    if decoder.in_shortcut:
        shortcut = torch.eye(len(matrix)).double()
        shortcut = shortcut.repeat_interleave(decoder.in_shortcut_repeats, dim=0)
        changed[:, :, 1, 1] += shortcut @ matrix - shortcut
    conv.weight.copy_(changed)
