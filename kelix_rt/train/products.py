"""Products of bfloat16 factors while everything else stays float32: twice as fast where hardware
has them, and near enough for training (measured in docs/kelix-tiny.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kelix_rt.models.products import Replacing


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rounded = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(*rounded)
        return F.linear(*rounded).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rounded = grad.bfloat16()
        of_x = (rounded @ weight).float() if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None
        return of_x, (rounded.flatten(0, -2).mT @ x.flatten(0, -2)).float()


class Bfloat16Products(Replacing):
    """Inside `with`, F.linear of float32 rounds its factors to bfloat16, and so does its backward.

    Sums are float32; a product is rounded once more and given as float32. Equivalent to
    `F.linear(x.bfloat16(), weight.bfloat16()).float() + bias`. Unlike autocast nothing else
    changes its dtype: norms, attention and losses of the small models here are slower in bfloat16.
    """

    def __init__(self) -> None:
        super().__init__({F.linear: _linear})


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.dtype != torch.float32:
        return F.linear(input, weight, bias)
    product: Tensor = _Product.apply(input, weight)
    return product if bias is None else product + bias
