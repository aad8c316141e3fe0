"""silu_mul against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from kelix_rt import ops
from tests.ops.helpers import DEVICES, DTYPES, assert_as_accurate_as_torch, opcheck, randn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 5, 130), (0, 8), (9, 3072), (2, 5008)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = randn(*shape, dtype=dtype, device=device, scale=4.0)
    gate, up = x.double().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    assert_as_accurate_as_torch(ops.silu_mul(x), ops.silu_mul_ref(x), exact)


def test_extreme_gates() -> None:
    """exp neither overflows nor turns NaN and infinity into numbers."""
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4, torch.inf, -torch.inf, torch.nan])
    got = ops.silu_mul(torch.cat((gate, torch.ones_like(gate))))
    want = torch.tensor([0.0, 0.0, 0.0, 0.0, 88.0, 1e4, torch.inf, torch.nan, torch.nan])
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-30, rtol=1e-6)


def test_non_contiguous_input() -> None:
    x = randn(8, 5).T
    assert torch.equal(ops.silu_mul(x), ops.silu_mul(x.contiguous()))


def test_memory_aligned_to_one_element() -> None:
    x = randn(3 * 32 + 1)[1:].view(3, 32)
    assert torch.equal(ops.silu_mul(x), ops.silu_mul(x.clone()))


def test_errors_name_the_rule() -> None:
    with pytest.raises(RuntimeError, match=r"silu_mul: x must have an even last dim.*\[2, 5\]"):
        ops.silu_mul(randn(2, 5))


def test_opcheck() -> None:
    opcheck(torch.ops.kelix.silu_mul.default, randn(3, 8))
