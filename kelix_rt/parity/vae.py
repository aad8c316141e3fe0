"""Parity of the image autoencoder with golden outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kelix_rt.models.vae import decode, load_vae, to_uint8
from kelix_rt.parity.fixtures import Fixtures
from kelix_rt.parity.report import Check

DECODED = 2e-5


def run(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> list[Check]:
    """Checks one golden directory; fixtures that are absent give no row."""
    vae = load_vae(path, device, dtype)
    golden = Fixtures(path, device, vae.dtype)
    return [*_decoder(golden, vae), *_small(golden, vae), *_encoder(golden, vae)]


def _decoder(golden: Fixtures, vae: Any) -> Iterator[Check]:
    if "latent" not in golden:
        return
    seen: dict[str, Tensor] = {}
    handles = []
    for key in golden.tensors:
        module = _module(vae.decoder, key)
        if module is not None:
            handles.append(module.register_forward_hook(_keep(seen, key)))
    try:
        pixels = decode(vae, golden["latent"])
    finally:
        for handle in handles:
            handle.remove()
    for key, value in seen.items():
        yield from golden.close(key, value, DECODED)
    yield from golden.close("decoded", pixels, DECODED)
    yield from golden.pixels("image_uint8", to_uint8(pixels)[0])


def _keep(seen: dict[str, Tensor], key: str) -> Any:
    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen[key] = output.float().clone()

    return hook


def _module(decoder: Any, key: str) -> Any:
    """The decoder's part whose output `key` holds, None for other keys."""
    if key == "dec.conv_in_no_shortcut":
        return decoder.conv_in
    match = re.fullmatch(r"dec\.up_block\.(\d+)(\.evit0)?(\.attn)?", key)
    if match is None:
        return None
    stage = decoder.up_blocks[int(match.group(1))]
    if match.group(2) is None:
        return stage
    block = next(part for part in stage if hasattr(part, "attn"))
    return block.attn if match.group(3) else block


def _small(golden: Fixtures, vae: Any) -> Iterator[Check]:
    """A latent so small that the autoencoder takes its quadratic attention branch."""
    if "small.latent" in golden:
        pixels = decode(vae, golden["small.latent"])
        yield from golden.close("small.decoded", pixels, DECODED)


@torch.no_grad()
def _encoder(golden: Fixtures, vae: Any) -> Iterator[Check]:
    if "enc.image" in golden:
        latent = vae.encode(golden["enc.image"].to(vae.dtype)).latent
        scaled = latent.float() * vae.config.scaling_factor
        yield from golden.close("enc.latent_scaled", scaled, DECODED)
