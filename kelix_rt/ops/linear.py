"""Products of a few rows with a large matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from kelix_rt.ops._autograd import differentiate
from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._wide import wide


def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for few rows: every weight is read once, at the speed of memory.

    x: [T, I]; weight: [O, I]; one dtype of float32, bfloat16 or float16. Returns [T, O]. Summed in
    float32 with one rounding; a row's result does not depend on the others. Above about 8 rows a
    library's matrix product is faster. Raises RuntimeError for other shapes and dtypes.
    """
    return torch.ops.kelix.skinny_linear(x, weight)


def skinny_linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """Plain-torch `skinny_linear`."""
    return (wide(x) @ wide(weight).T).to(x.dtype)


def skinny_linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x @ (weight * scale[:, None]).T`` for few rows and int8 weights: each is read once.

    x: [T, I] float32, bfloat16 or float16; weight: [O, I] int8 and scale: [O] float32, as
    `kelix_rt.quantization.quantize_int8` makes them. Returns [T, O] of x's dtype. Weights are
    widened in registers and summed in float32, the sum is multiplied by the row's scale and rounded
    once; a row's result does not depend on the others. Gradients reach x and scale. Raises
    RuntimeError for other shapes and dtypes.
    """
    return torch.ops.kelix.skinny_linear_int8(x, weight, scale)


def skinny_linear_int8_ref(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Plain-torch `skinny_linear_int8`."""
    return (wide(x) @ weight.to(wide(x).dtype).T * scale).to(x.dtype)


@register_fake("skinny_linear")
def _skinny_linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register_fake("skinny_linear_int8")
def _skinny_linear_int8_fake(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


differentiate("skinny_linear", skinny_linear_ref)
differentiate("skinny_linear_int8", skinny_linear_int8_ref)
