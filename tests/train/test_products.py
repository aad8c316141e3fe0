from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt.models import products
from kelix_rt.train.loop import run_stage
from kelix_rt.train.products import Bfloat16Products


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 7, 12), (5, 12), (5,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("with_bias", [False, True])
def test_factors_are_rounded_and_results_are_float32(with_bias: bool) -> None:
    x, weight, bias = leaves()
    given = bias if with_bias else None
    with Bfloat16Products():
        product = F.linear(x, weight, bias=given)
    expected = F.linear(x.bfloat16(), weight.bfloat16()).float()
    assert product.dtype == torch.float32
    assert torch.equal(product, expected + bias if with_bias else expected)
    assert not torch.equal(product, F.linear(x, weight, given))


def test_gradients_are_those_of_the_rounded_factors() -> None:
    x, weight, bias = leaves()
    grad = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    with Bfloat16Products():
        product = F.linear(x, weight, bias)
    found = torch.autograd.grad(product, (x, weight, bias), grad)  # outside, as trainers do it
    rounded = grad.bfloat16()
    assert torch.equal(found[0], (rounded @ weight.bfloat16()).float())
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_factors_get_no_gradient(frozen: int) -> None:
    factors = leaves()[:2]
    factors[frozen].requires_grad_(False)
    with Bfloat16Products():
        F.linear(*factors).sum().backward()
    assert factors[frozen].grad is None and factors[1 - frozen].grad is not None


def test_modules_take_part_and_other_dtypes_pass() -> None:
    layer = nn.Linear(12, 5)
    x = torch.randn(3, 12)
    plain = layer(x)
    with Bfloat16Products():
        assert not torch.equal(layer(x), plain)
        assert layer.double()(x.double()).dtype == torch.float64
        assert torch.equal(torch.tanh(x), x.tanh())


@pytest.mark.parametrize("fast", [False, True])
def test_a_stage_takes_them_where_they_are_fast(
    fast: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(products, "are_native", lambda dtype, device: fast)
    torch.manual_seed(0)
    layer = nn.Linear(12, 5)
    x = torch.randn(3, 12)
    plain, seen = layer(x), []

    def loss_fn(step: int) -> dict[str, Tensor]:
        seen.append(layer(x))
        return {"loss": seen[-1].square().mean()}

    run_stage(
        "s", modules={"layer": layer}, parameters=layer.parameters(), loss_fn=loss_fn, steps=1,
        lr=1e-3, warmup=1, out=tmp_path, dtype=torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(seen[0], plain) is not fast
