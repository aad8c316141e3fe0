"""Products and residual additions.

Additions are in place at inference and out of place where gradients are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.ops.diffusion import gated_sum

# Up to so many rows ops.skinny_linear is ahead of torch on a CPU (docs/kernels/linear.md). On a GPU
# nobody has measured it yet.
SKINNY_ROWS = {torch.float32: 48, torch.bfloat16: 12, torch.float16: 12}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of a large matrix. x: [T, I]; weight: [O, I]. Returns [T, O]."""
    if x.device.type == "cpu" and len(x) <= SKINNY_ROWS.get(x.dtype, 0):
        return ops.skinny_linear(x, weight)
    return F.linear(x, weight)


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
