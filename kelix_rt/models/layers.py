"""Products, of int8 weights too, and residual additions.

Additions are in place at inference and out of place where gradients are needed.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from kelix_rt import ops
from kelix_rt.models.products import product
from kelix_rt.ops.diffusion import gated_sum
from kelix_rt.quantization import TILE, TILE_GPU, dequantize_int8, quantize_int8

# Up to so many rows ops.skinny_linear is ahead of torch on a CPU (docs/kernels/linear.md). On a GPU
# nobody has measured it yet.
SKINNY_ROWS = {torch.float32: 48, torch.bfloat16: 12, torch.float16: 12}
# The same of ops.skinny_linear_int8 against torch's product of the weights made floating again; in
# float32 it is ahead with any number on a CPU, else and on a GPU, where it is an estimate, to here.
INT8_ROWS = 32


class Int8Linear(nn.Module):
    """nn.Linear without bias of int8 weights [O, I] and a float32 scale [O] for each row.

    Made of a Linear on any device, meta included; the weights are `quantize_int8` of its own.
    """

    weight: nn.Parameter
    weight_scale: Tensor

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        assert source.bias is None
        weight, scale = quantize_int8(source.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O], in x's dtype."""
        return int8_linear(x, self.weight, self.weight_scale)


Projection: TypeAlias = nn.Linear | Int8Linear


def quantize_linears(module: nn.Module) -> None:
    """Replaces every nn.Linear inside by its Int8Linear, one at a time."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                setattr(owner, name, Int8Linear(child))


def linear(x: Tensor, layer: Projection) -> Tensor:
    """x @ weight.T of a layer without bias: nn.Linear or Int8Linear. x: [T, I] -> [T, O]."""
    if isinstance(layer, Int8Linear):
        return int8_linear(x, layer.weight, layer.weight_scale)
    if x.device.type == "cpu" and len(x) <= SKINNY_ROWS.get(x.dtype, 0):
        return ops.skinny_linear(x, layer.weight)
    return product(x, layer.weight)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ (weight * scale[:, None]).T for any number of rows.

    x: [T, I]; weight: [O, I] int8; scale: [O] float32. Returns [T, O] in x's dtype. Many rows take
    torch's product with a tile of the weights at a time, made floating for it alone.
    """
    on_cpu = x.device.type == "cpu"
    if len(x) <= INT8_ROWS or (on_cpu and x.dtype == torch.float32):
        return ops.skinny_linear_int8(x, weight, scale)
    step = max(1, (TILE if on_cpu else TILE_GPU) // weight.shape[1])
    tiles = zip(weight.split(step), scale.split(step), strict=True)
    return torch.cat([product(x, dequantize_int8(w, s, x.dtype)) for w, s in tiles], dim=-1)


def needs_grad(*tensors: Tensor) -> bool:
    """True while autograd records and any of the tensors takes part in it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def add(x: Tensor, update: Tensor) -> Tensor:
    """x + update; x is overwritten unless gradients are needed."""
    return x + update if needs_grad(x, update) else x.add_(update)


def add_and_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, and its `ops.rms_norm`; residual is overwritten unless gradients are needed.

    residual, x: [..., D], residual contiguous. weight: [D]. Both results are [..., D].
    """
    if needs_grad(residual, x, weight):
        residual = residual + x
        return residual, ops.rms_norm(residual, weight, eps)
    return residual, ops.add_rms_norm(residual, x, weight, eps)


def gated_add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y; x is overwritten unless gradients are needed.

    x, y: [B, N, C], x contiguous. gate: [B, C].
    """
    if needs_grad(x, gate, y):
        return gated_sum(x, gate, y)
    ops.gated_residual(x, gate, y)
    return x
