"""The models; `load` picks the class a directory's config names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kelix_rt.checkpoint import resolve
from kelix_rt.config import KelixConfig, SanaConfig, TokenizerConfig, read_config


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Loads a checkpoint directory (or hub id) as the model its config.json describes.

    Returns KelixLM, VisionTokenizer, KelixDiT or diffusers' AutoencoderDC, in eval mode on
    `device`. dtype None keeps the checkpoint's own. Raises ConfigError or WeightError.
    """
    directory = resolve(path)
    config = read_config(directory)
    if isinstance(config, KelixConfig):
        from kelix_rt.models.language_model import KelixLM

        return KelixLM.from_pretrained(directory, device, dtype)
    if isinstance(config, TokenizerConfig):
        from kelix_rt.models.vision_tokenizer import VisionTokenizer

        return VisionTokenizer.from_pretrained(directory, device=device, dtype=dtype)
    if isinstance(config, SanaConfig):
        from kelix_rt.models.dit import KelixDiT

        return KelixDiT.from_pretrained(directory, device, dtype)
    from kelix_rt.models.vae import load_vae

    vae: nn.Module = load_vae(directory, device, dtype)
    return vae
