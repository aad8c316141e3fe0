"""The golden tensors of one directory of the image models, and how they are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt.parity.report import Check, equal, max_abs, relative_rms

LOW_PRECISION = 2e-2  # relative RMS of a bfloat16 or float16 run against float32 goldens
UNEQUAL_PIXELS = 5e-3


def read_notes(directory: Path) -> dict[str, Any]:
    """The values of `fixtures.json`; none where there is no such file."""
    file = directory / "fixtures.json"
    notes: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return notes


class Fixtures:
    """Tensors of `fixtures.safetensors` and values of `fixtures.json`, compared for one dtype.

    Comparisons with a key that is absent give no row.
    """

    def __init__(self, path: Path | str, device: torch.device | str, dtype: torch.dtype) -> None:
        directory = Path(path)
        self.tensors = load_file(directory / "fixtures.safetensors", device=str(device))
        self.notes = read_notes(directory)
        self.exact = dtype == torch.float32

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def close(self, key: str, got: Tensor, tolerance: float) -> Iterator[Check]:
        """Within `tolerance` absolutely in float32, else within LOW_PRECISION relatively."""
        if key not in self.tensors:
            return
        want = self.tensors[key]
        if self.exact:
            yield max_abs(key, got, want, tolerance)
        else:
            yield relative_rms(key, got, want, LOW_PRECISION)

    def same(self, key: str, got: Tensor) -> Iterator[Check]:
        """Equal in every bit."""
        if key in self.tensors:
            yield equal(key, got, self.tensors[key])

    def pixels(self, key: str, got: Tensor) -> Iterator[Check]:
        """uint8 images [H, W, 3]; see `compare_pixels`."""
        if key in self.tensors:
            yield compare_pixels(key, got, self.tensors[key], self.exact)


def compare_pixels(name: str, got: Tensor, want: Tensor, exact: bool) -> Check:
    """float32: no value off by more than 1 and 99.5 % equal; else LOW_PRECISION relatively."""
    if not exact or got.shape != want.shape:
        return relative_rms(name, got, want, LOW_PRECISION)
    difference = (got.cpu().int() - want.cpu().int()).abs()
    share, largest = float((difference > 0).double().mean()), int(difference.max())
    ok = share <= UNEQUAL_PIXELS and largest <= 1
    return Check(name, share, UNEQUAL_PIXELS, ok, f"share unequal, largest difference {largest}")
