"""rms_norm, add_rms_norm and layer_norm against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from kelix_rt import ops
from tests.ops.helpers import DEVICES, DTYPES, assert_as_accurate_as_torch, opcheck, randn

# The last two are longer than the part of a row that a CUDA kernel keeps in registers.
SHAPES = [(1, 1), (3, 7), (2, 5, 64), (17, 1152), (0, 8), (4, 2240), (2, 24584), (2, 3075)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = randn(*shape, dtype=dtype, device=device)
    weight = randn(shape[-1], dtype=dtype, device=device, seed=1)
    exact = ops.rms_norm_ref(x.double(), weight.double(), 1e-6)
    assert_as_accurate_as_torch(
        ops.rms_norm(x, weight, 1e-6), ops.rms_norm_ref(x, weight, 1e-6), exact
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = randn(*shape, dtype=dtype, device=device)
    residual = randn(*shape, dtype=dtype, device=device, seed=2)
    weight = randn(shape[-1], dtype=dtype, device=device, seed=1)
    mine, theirs, exact = residual.clone(), residual.clone(), residual.double()
    got = ops.add_rms_norm(mine, x, weight, 1e-6)
    plain = ops.add_rms_norm_ref(theirs, x, weight, 1e-6)
    double = ops.add_rms_norm_ref(exact, x.double(), weight.double(), 1e-6)
    assert torch.equal(mine, theirs), "the residual is a plain sum: it must be bit-equal"
    assert_as_accurate_as_torch(got, plain, double)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(shape: tuple[int, ...], affine: bool, dtype: torch.dtype, device: str) -> None:
    x = randn(*shape, dtype=dtype, device=device) + 3
    weight = randn(shape[-1], dtype=dtype, device=device, seed=1) if affine else None
    bias = randn(shape[-1], dtype=dtype, device=device, seed=2) if affine else None
    double = [None if t is None else t.double() for t in (weight, bias)]
    exact = ops.layer_norm_ref(x.double(), *double, 1e-5)
    assert_as_accurate_as_torch(
        ops.layer_norm(x, weight, bias, 1e-5), ops.layer_norm_ref(x, weight, bias, 1e-5), exact
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (2, 3, 4, 64), (0, 2, 8), (3, 2, 3075)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_with_a_row_of_weights_for_each(
    shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, device: str
) -> None:
    x = randn(*shape, dtype=dtype, device=device) + 3
    weight = randn(*shape[-2:], dtype=dtype, device=device, seed=1)
    bias = randn(*shape[-2:], dtype=dtype, device=device, seed=2) if has_bias else None
    double = [None if t is None else t.double() for t in (weight, bias)]
    exact = ops.layer_norm_ref(x.double(), *double, 1e-5)
    got = ops.layer_norm(x, weight, bias, 1e-5)
    assert_as_accurate_as_torch(got, ops.layer_norm_ref(x, weight, bias, 1e-5), exact)
    for i in range(shape[-2]):
        row_bias = None if bias is None else bias[i]
        assert torch.equal(got[..., i, :], ops.layer_norm(x[..., i, :], weight[i], row_bias, 1e-5))


def test_layer_norm_far_from_zero() -> None:
    """The variance survives a mean 10^4 times larger than the spread."""
    x = randn(4, 256) + 1e4
    exact = ops.layer_norm_ref(x.double(), None, None, 1e-6)
    assert (ops.layer_norm(x, None, None, 1e-6) - exact).abs().max() < 2e-3


@pytest.mark.parametrize("cols", [120, 1000])
def test_a_large_constant_row_has_no_variance(cols: int) -> None:
    """Rounding leaves less than nothing of it at these widths, whose root would be NaN."""
    x = torch.full((3, cols), 3e7) + torch.tensor([[0.0], [5e6], [-7e7]])
    assert ops.layer_norm(x, None, None, 1e-6).abs().max() < 0.01
    shift, scale = torch.zeros(1, cols), torch.zeros(1, cols)
    assert ops.modulate(x[None], shift, scale, 1e-6).abs().max() < 0.01


def test_eps_matters_on_quiet_rows() -> None:
    x = randn(4, 64, scale=1e-3)
    near = ops.layer_norm(x, None, None, 1e-6)
    far = ops.layer_norm(x, None, None, 1e-5)
    assert (near - far).abs().max() > 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_input(device: str) -> None:
    x = randn(6, 10, device=device).T
    weight = randn(12, device=device)[::2]
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x.contiguous(), weight.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_aligned_to_one_element(dtype: torch.dtype) -> None:
    """Contiguous rows that wide loads must not touch."""
    x = randn(3 * 64 + 1, dtype=dtype)[1:].view(3, 64)
    weight = randn(64 + 1, dtype=dtype, seed=1)[1:]
    exact = ops.rms_norm_ref(x.double(), weight.double(), 1e-6)
    plain = ops.rms_norm_ref(x, weight, 1e-6)
    for inputs in [(x, weight.clone()), (x.clone(), weight)]:
        assert_as_accurate_as_torch(ops.rms_norm(*inputs, 1e-6), plain, exact)
    exact = ops.layer_norm_ref(x.double(), weight.double(), weight.double(), 1e-6)
    plain = ops.layer_norm_ref(x, weight, weight, 1e-6)
    for inputs in [(x, weight, weight), (x.clone(), weight, weight.clone())]:
        assert_as_accurate_as_torch(ops.layer_norm(*inputs, 1e-6), plain, exact)
    residual = randn(3, 64, dtype=dtype, seed=2)
    straight, moved = residual.clone(), residual.clone()
    want = ops.add_rms_norm(straight, x.clone(), weight.clone(), 1e-6)
    torch.testing.assert_close(ops.add_rms_norm(moved, x, weight, 1e-6), want)
    assert torch.equal(moved, straight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.rms_norm(randn(2, 70), randn(5)),
            r"rms_norm: weight must have shape \[D=70\], got \[5\]",
        ),
        (
            lambda: ops.rms_norm(randn(2, 7).double(), randn(7).double()),
            "rms_norm: x must be float32, bfloat16 or float16, got float64",
        ),
        (
            lambda: ops.rms_norm(randn(2, 7), randn(7).bfloat16()),
            "rms_norm: weight must be float32 like x, got bfloat16",
        ),
        (
            lambda: ops.layer_norm(randn(2, 3, 7), randn(2, 7)),
            r"layer_norm: weight must have shape \[N=3, D=7\], got \[2, 7\]",
        ),
        (
            lambda: ops.layer_norm(randn(2, 3, 7), randn(3, 7), randn(7)),
            r"layer_norm: bias must have shape \[N=3, D=7\], got \[7\]",
        ),
        (
            lambda: ops.layer_norm(randn(7), randn(3, 7)),
            r"layer_norm: x must have shape \[..., N, D=7\], got \[7\]",
        ),
        (
            lambda: ops.add_rms_norm(randn(7, 2).T, randn(2, 7), randn(7)),
            "add_rms_norm: residual must be contiguous",
        ),
        (
            lambda: ops.add_rms_norm(randn(3, 7), randn(2, 7), randn(7)),
            r"add_rms_norm: x must have the shape of residual \[3, 7\], got \[2, 7\]",
        ),
    ],
)
def test_errors_name_the_rule(call: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()  # type: ignore[operator]


def test_opcheck() -> None:
    opcheck(torch.ops.kelix.rms_norm.default, randn(3, 8), randn(8), 1e-6)
    opcheck(torch.ops.kelix.add_rms_norm.default, randn(3, 8), randn(3, 8), randn(8), 1e-6)
    opcheck(torch.ops.kelix.layer_norm.default, randn(3, 8), randn(8), randn(8), 1e-5)
