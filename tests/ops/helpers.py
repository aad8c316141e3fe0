"""What the operator tests share: devices, dtypes, references in float64, tolerances, opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
        ],
    ),
]


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Seeded normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def to_double(value: Any) -> Any:
    """Floating tensors as float64, everything else as it is (recursively through tuples)."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def assert_as_accurate_as_torch(got: Tensor, in_dtype: Tensor, exact: Tensor) -> None:
    """`got` errs at most twice as much as plain torch in the same dtype, against float64.

    One rounding of the result is always allowed: torch may be lucky and exact.
    """
    assert got.shape == exact.shape, f"shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
    assert got.dtype == in_dtype.dtype
    exact = exact.double().cpu()
    error = (got.double().cpu() - exact).abs().max().item() if got.numel() else 0.0
    torch_error = (in_dtype.double().cpu() - exact).abs().max().item() if got.numel() else 0.0
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item() if got.numel() else 0.0
    assert error <= 2 * torch_error + rounding, (
        f"error {error:.3e} > 2 x torch's {torch_error:.3e} + one rounding {rounding:.3e}"
    )


def opcheck(op: Callable[..., Any], *args: Any) -> None:
    """Schema, fake kernel and dispatch of an operator (torch.library.opcheck)."""
    torch.library.opcheck(
        op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
