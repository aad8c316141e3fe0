"""Products of 16-bit factors made in float32, whatever this machine's CPU can multiply."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt.models import products
from kelix_rt.models.products import Float32Products, Linear, are_native, product
from kelix_rt.testing import assert_as_accurate_as_torch, randn

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@pytest.fixture
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies float32 only."""
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: dtype == torch.float32)


@pytest.mark.usefixtures("no_instructions")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("tile", [1 << 20, 3 * 40, 1])
def test_a_product_is_rounded_once(
    dtype: torch.dtype, bias: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TILE", tile)
    x, weight = randn(2, 5, 40, dtype=dtype), randn(7, 40, dtype=dtype, seed=1)
    offset = randn(7, dtype=dtype, seed=2) if bias else None
    got = product(x, weight, offset)
    wide = None if offset is None else offset.float()
    if weight.numel() <= tile:
        assert torch.equal(got, F.linear(x.float(), weight.float(), wide).to(dtype))
    exact = F.linear(x.double(), weight.double(), None if wide is None else wide.double())
    assert_as_accurate_as_torch(got, F.linear(x, weight, offset), exact)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32], ids=str)
def test_what_the_device_multiplies_is_left_to_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: True)
    x, layer = randn(3, 12, dtype=dtype), Linear(12, 5).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_any_gpu_and_float32_are_native() -> None:
    assert all(are_native(dtype, "cuda") for dtype in (*SIXTEEN_BITS, torch.float32))
    assert are_native(torch.float32, "cpu")


@pytest.mark.usefixtures("no_instructions")
def test_gradients_come_back_in_the_factors_dtype() -> None:
    x, layer = randn(3, 12, dtype=torch.bfloat16).requires_grad_(), Linear(12, 5).bfloat16()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(
        x.grad, layer.weight.detach().float().sum(0).bfloat16().expand(3, 12)
    )


def test_a_foreign_model_keeps_its_dtype() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).bfloat16()
    x = randn(1, 3, 6, 6, dtype=torch.bfloat16)

    def wide(layer: nn.Module, value: Tensor) -> Tensor:
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        parts = value.float(), layer.weight.float(), layer.bias.float()
        return F.conv2d(*parts, padding=layer.padding).bfloat16()

    with torch.no_grad(), Float32Products():
        got = model(x)
    with torch.no_grad():
        assert torch.equal(got, wide(model[2], wide(model[0], x).relu()))
    assert next(model.parameters()).dtype == got.dtype == torch.bfloat16
