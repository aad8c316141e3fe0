"""skinny_linear and skinny_linear_int8 against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from kelix_rt import ops
from kelix_rt.quantization import dequantize_int8, quantize_int8
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


def test_any_number_of_threads_and_rows() -> None:
    """The limits are those of a GPU's grids."""
    x, weight = randn(4 * 65535 + 1, 2), randn(1, 2, seed=1)
    torch.testing.assert_close(ops.skinny_linear(x, weight), x @ weight.T)
    weight, scale = quantize_int8(randn(16 * 65535 + 1, 2, seed=1))
    got = ops.skinny_linear_int8(x[:1], weight, scale)
    torch.testing.assert_close(got, x[:1] @ dequantize_int8(weight, scale, torch.float32).T)


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


INT8_SHAPES = [  # whole vectors of 16 weights, an odd end of the outputs, tiles of 1, 4 and 8 rows
    *SHAPES, (1, 1040, 33), (4, 48, 17), (8, 528, 16), (13, 1024, 31), (70, 96, 18),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", INT8_SHAPES)
def test_skinny_linear_int8(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    rows, inputs, outputs = shape
    x = randn(rows, inputs, dtype=dtype, device=device)
    weight, scale = quantize_int8(randn(outputs, inputs, device=device, seed=1))
    exact = x.double() @ (weight.double() * scale.double().unsqueeze(1)).T
    plain = torch.nn.functional.linear(x, dequantize_int8(weight, scale, dtype))
    assert_as_accurate_as_torch(ops.skinny_linear_int8(x, weight, scale), plain, exact)
    reference = ops.skinny_linear_int8_ref(x, weight, scale)
    assert_as_accurate_as_torch(reference, plain, exact)


@pytest.mark.parametrize("inputs", [16, 21])
def test_every_int8_value_is_exact(inputs: int) -> None:
    """-128 too, which quantize_int8 never gives: products with a unit row are the weights."""
    values = torch.arange(-128, 128, dtype=torch.int8)
    weight = values.unsqueeze(1).repeat(1, inputs)
    x = torch.zeros(1, inputs)
    x[0, inputs - 1] = 1
    got = ops.skinny_linear_int8(x, weight, torch.full((256,), 0.5))
    assert torch.equal(got[0], values.float() / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [96, 100])
def test_a_row_times_int8_does_not_depend_on_the_others(dtype: torch.dtype, inputs: int) -> None:
    x = randn(19, inputs, dtype=dtype)
    weight, scale = quantize_int8(randn(37, inputs, seed=1))
    whole = ops.skinny_linear_int8(x, weight, scale)
    for first, last in ((0, 1), (3, 6), (1, 19), (18, 19)):
        assert torch.equal(ops.skinny_linear_int8(x[first:last], weight, scale), whole[first:last])


def test_int8_of_non_contiguous_and_unaligned_inputs() -> None:
    weight, scale = quantize_int8(randn(6, 48, seed=1))
    x = randn(48, 3).T
    want = ops.skinny_linear_int8(x.contiguous(), weight, scale)
    assert torch.equal(ops.skinny_linear_int8(x, weight.T.contiguous().T, scale), want)
    shifted = torch.empty(6 * 48 + 1, dtype=torch.int8)[1:].view(6, 48).copy_(weight)
    got = ops.skinny_linear_int8(x, shifted, scale)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_through_int8_weights() -> None:
    weight, scale = quantize_int8(randn(5, 12, seed=1))
    x = randn(3, 12).requires_grad_()
    scale.requires_grad_()
    ops.skinny_linear_int8(x, weight, scale).sum().backward()
    wide = weight * scale.detach().unsqueeze(1)
    torch.testing.assert_close(x.grad, wide.sum(0).expand(3, 12))
    torch.testing.assert_close(scale.grad, (x.detach() @ weight.float().T).sum(0))


def test_int8_errors_name_the_rule() -> None:
    x, scale = randn(2, 8), torch.ones(3)
    weight = torch.ones(3, 8, dtype=torch.int8)
    calls = [
        ((x, weight[:, :7], scale), r"weight must have shape \[O, I=8\], got \[3, 7\]"),
        ((x, weight, scale[:2]), r"scale must have shape \[O=3\], got \[2\]"),
        ((x, weight.float(), scale), "weight must be int8, got float32"),
        ((x, weight, scale.bfloat16()), "scale must be float32, got bfloat16"),
        ((x.double(), weight, scale), "x must be float32, bfloat16 or float16, got float64"),
    ]
    for arguments, message in calls:
        with pytest.raises(RuntimeError, match=f"skinny_linear_int8: {message}"):
            ops.skinny_linear_int8(*arguments)


def test_errors_name_the_rule() -> None:
    with pytest.raises(RuntimeError, match=r"skinny_linear: weight must have shape \[O, I=8\]"):
        ops.skinny_linear(randn(2, 8), randn(3, 9))
    with pytest.raises(RuntimeError, match="skinny_linear: weight"):
        ops.skinny_linear(randn(2, 8), randn(3, 8, dtype=torch.bfloat16))


def test_opcheck() -> None:
    opcheck(torch.ops.kelix.skinny_linear.default, randn(2, 8), randn(3, 8, seed=1))


def test_opcheck_int8() -> None:
    weight, scale = quantize_int8(randn(3, 8, seed=1))
    opcheck(torch.ops.kelix.skinny_linear_int8.default, randn(2, 8), weight, scale)
