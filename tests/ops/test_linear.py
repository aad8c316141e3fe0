"""skinny_linear against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from kelix_rt import ops
from tests.ops.helpers import DEVICES, DTYPES, assert_as_accurate_as_torch, opcheck, randn

SHAPES = [  # rows, in, out
    (1, 64, 32), (1, 1, 1), (2, 33, 7), (3, 130, 65), (4, 512, 96), (5, 40, 9), (8, 264, 48),
    (9, 17, 3), (0, 8, 8), (2, 0, 5), (3, 8, 0), (1, 1024, 515),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_skinny_linear(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    rows, inputs, outputs = shape
    x = randn(rows, inputs, dtype=dtype, device=device)
    weight = randn(outputs, inputs, dtype=dtype, device=device, seed=1)
    exact = x.double() @ weight.double().T
    plain = torch.nn.functional.linear(x, weight)
    assert_as_accurate_as_torch(ops.skinny_linear(x, weight), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight = randn(9, 100, dtype=dtype), randn(37, 100, dtype=dtype, seed=1)
    whole = ops.skinny_linear(x, weight)
    for row in range(9):
        assert torch.equal(ops.skinny_linear(x[row : row + 1], weight)[0], whole[row])


def test_nan_and_infinity_stay_in_their_row() -> None:
    x, weight = randn(3, 40), randn(5, 40, seed=1)
    x[1, 7] = torch.nan
    x[2, 3] = torch.inf
    got = ops.skinny_linear(x, weight)
    assert got[0].isfinite().all() and got[1].isnan().all() and got[2].isinf().all()


def test_non_contiguous_and_unaligned_inputs() -> None:
    x, weight = randn(40, 3).T, randn(40, 6, seed=1).T
    want = ops.skinny_linear(x.contiguous(), weight.contiguous())
    assert torch.equal(ops.skinny_linear(x, weight), want)
    shifted = randn(3 * 40 + 1)[1:].view(3, 40)
    got = ops.skinny_linear(shifted, weight)
    torch.testing.assert_close(got, ops.skinny_linear_ref(shifted, weight), atol=1e-5, rtol=1e-5)


def test_errors_name_the_rule() -> None:
    with pytest.raises(RuntimeError, match=r"skinny_linear: weight must have shape \[O, I=8\]"):
        ops.skinny_linear(randn(2, 8), randn(3, 9))
    with pytest.raises(RuntimeError, match="skinny_linear: weight"):
        ops.skinny_linear(randn(2, 8), randn(3, 8, dtype=torch.bfloat16))


def test_opcheck() -> None:
    opcheck(torch.ops.kelix.skinny_linear.default, randn(2, 8), randn(3, 8, seed=1))
