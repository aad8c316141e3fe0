"""The arithmetic type of the references."""

from __future__ import annotations

from torch import Tensor, float64


def wide(tensor: Tensor) -> Tensor:
    """float32, the operators' arithmetic; float64 stays, so that a reference can also be exact."""
    return tensor if tensor.dtype == float64 else tensor.float()
