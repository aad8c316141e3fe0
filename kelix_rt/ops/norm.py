"""Normalisations: RMSNorm, RMSNorm fused with the residual addition, LayerNorm.

All take float32, bfloat16 or float16 and compute in float32. RMSNorm rounds twice, as Qwen3 does:
the normalised value is rounded to the tensor's dtype before the weight multiplies it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kelix_rt.ops._autograd import differentiate, writes
from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._gradients import layer_norm_backward, rms_norm_backward
from kelix_rt.ops._wide import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``weight * round(x / sqrt(mean(x^2) + eps))`` over the last axis.

    x: [..., D]. weight: [D], same dtype as x. Returns [..., D], contiguous, dtype of x.
    """
    return torch.ops.kelix.rms_norm(x, weight, eps)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain-torch `rms_norm`."""
    values = wide(x)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


@register_fake("rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Adds x to the residual stream in place, then returns `rms_norm` of the new residual.

    residual: [..., D], contiguous, overwritten with ``round(residual + x)``; the norm reads the
    rounded value. x: same shape and dtype. weight: [D]. Returns [..., D]. Raises RuntimeError where
    an input requires a gradient: it has none.
    """
    writes("add_rms_norm", (residual,), x, weight)
    return torch.ops.kelix.add_rms_norm(residual, x, weight, eps)


def add_rms_norm_ref(residual: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain-torch `add_rms_norm`; mutates residual too."""
    residual.add_(x)
    return rms_norm_ref(residual, weight, eps)


@register_fake("add_rms_norm")
def _add_rms_norm_fake(residual: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis, one rounding.

    x: [..., D]. weight, bias: [D], or [N, D] for x [..., N, D], in the dtype of x; None for 1 and
        0. Biased variance.
    Returns [..., D], contiguous, dtype of x.
    """
    return torch.ops.kelix.layer_norm(x, weight, bias, eps)


def layer_norm_ref(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Plain-torch `layer_norm`."""
    normed = torch.nn.functional.layer_norm(wide(x), x.shape[-1:], eps=eps)
    if weight is not None:
        normed = normed * wide(weight)
    if bias is not None:
        normed = normed + wide(bias)
    return normed.to(x.dtype)


@register_fake("layer_norm")
def _layer_norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


differentiate("rms_norm", rms_norm_ref, rms_norm_backward)
differentiate("layer_norm", layer_norm_ref, layer_norm_backward)
