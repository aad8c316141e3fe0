"""Parity of condition -> denoising -> pixels: a directory with `dit/`, `vae/` and fixtures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.vae import decode, load_vae, to_uint8
from kelix_rt.parity.dit import EULER, layout, schedules
from kelix_rt.parity.fixtures import Fixtures, compare_pixels
from kelix_rt.parity.report import Check
from kelix_rt.parity.vae import DECODED
from kelix_rt.stages.denoise import sample


def run(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> list[Check]:
    """Checks one golden directory; fixtures that are absent give no row."""
    directory = Path(path)
    dit = KelixDiT.from_pretrained(directory / "dit", device, dtype)
    vae = load_vae(directory / "vae", device, dit.dtype)
    golden = Fixtures(directory, device, dit.dtype)
    rows = list(schedules(golden, sampled=""))
    names = sorted({m.group(0) for k in golden.tensors if (m := re.match(r"cfg[\d.]*\d", k))})
    for name in names:
        rows += _image(golden, dit, vae, name, directory / f"image_{name}.png")
    return rows


def _image(golden: Fixtures, dit: KelixDiT, vae: Any, name: str, picture: Path) -> Iterator[Check]:
    latents = sample(
        dit,
        golden["cond_embeds"],
        golden["mask"],
        golden["latent0"],
        len(golden["timesteps"]),
        cfg=float(name.removeprefix("cfg")),
        shift=float(golden.notes.get("flow_shift", 3.0)),
        **layout(golden),
    )
    yield from golden.close(f"{name}.latents", latents.flatten(0, 1), EULER)
    pixels = decode(vae, latents[-1])
    yield from golden.close(f"{name}.decoded", pixels, DECODED)
    image = to_uint8(pixels)[0]
    yield from golden.pixels(f"{name}.image_uint8", image)
    if picture.exists():
        yield compare_pixels(picture.name, image, _read(picture), golden.exact)


def _read(picture: Path) -> Tensor:
    with Image.open(picture) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))
