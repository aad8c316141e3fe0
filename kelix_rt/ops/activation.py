"""The gated activation of SwiGLU feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor

from kelix_rt.ops._autograd import differentiate
from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._gradients import silu_mul_backward
from kelix_rt.ops._wide import wide


def silu_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of a fused projection whose first half is the gate.

    x: [..., 2F], float32, bfloat16 or float16. Returns [..., F], contiguous, dtype of x.
    Computed in float32 with one rounding at the end.
    """
    return torch.ops.kelix.silu_mul(x)


def silu_mul_ref(x: Tensor) -> Tensor:
    """Plain-torch `silu_mul`."""
    gate, up = wide(x).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


@register_fake("silu_mul")
def _silu_mul_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


differentiate("silu_mul", silu_mul_ref, silu_mul_backward)
