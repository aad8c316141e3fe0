"""Devices and dtypes of the operator tests, and opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kelix_rt.testing import assert_as_accurate_as_torch, randn

__all__ = ["DEVICES", "DTYPES", "assert_as_accurate_as_torch", "opcheck", "randn"]

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


def opcheck(op: torch._ops.OpOverload, *args: Any) -> None:
    """Schema, fake kernel and dispatch of an operator (torch.library.opcheck)."""
    torch.library.opcheck(
        op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
