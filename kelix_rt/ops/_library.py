"""Loads the native operators (`torch.ops.kelix.*`) once."""

from __future__ import annotations

from pathlib import Path

import torch

from kelix_rt.errors import NativeError

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi.so"


def load() -> None:
    """Load the operator library; NativeError when it was never built or does not fit this torch.

    Operators that torch.ops.load_library has already registered, from any file, stay as they are.
    """
    if hasattr(torch.ops.kelix, "build_info"):
        return
    if not LIBRARY.exists():
        raise NativeError(
            f"kelix_rt: {LIBRARY.name} is not built; run `pip install -e .` in the source directory"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise NativeError(
            f"kelix_rt: {LIBRARY.name} does not load under torch {torch.__version__} "
            f"(needs torch >= 2.10): {error}"
        ) from error


def build_info() -> dict[str, str]:
    """What the library was built with: `isa` it runs here, `cuda` targets ("" without nvcc), ..."""
    fields: str = torch.ops.kelix.build_info()
    return dict(part.split("=", 1) for part in fields.split())


load()
