"""Backward passes as native CPU kernels, for float32, measured against those through the references
in `benchmarks/bench_gradients.py`.

Each takes the upstream gradient and the inputs of its operator, and gives the gradients of the
tensors among those, in their order. `_autograd.differentiate` says when they are called.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kelix_rt.ops._fake import register_fake

Grads = tuple[Tensor | None, ...]
_PIECE = 64  # rows that are summed together: kGradientRows of csrc/common/gradients.h


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Grads:
    """Gradients of x and weight."""
    dx, sums = _norm_backward(grad, x, weight.unsqueeze(0), 0, False, eps)
    return dx, sums[0, 0]


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Grads:
    """Gradients of x, weight and bias; these two are [D] or [N, D], or None."""
    by_row = any(t is not None and t.dim() == 2 for t in (weight, bias))
    if by_row:  # the rows of a group lie together
        grad, x = grad.movedim(-2, 0), x.movedim(-2, 0)
    gain = weight.unsqueeze(0) if weight is not None and not by_row else weight
    dx, sums = _norm_backward(
        grad, x, gain, x[0].numel() // x.shape[-1] if by_row else 0, True, eps
    )
    if by_row:
        return dx.movedim(0, -2), *_of_those_given(sums.unbind(1), (weight, bias))
    return dx, *_of_those_given(sums[0], (weight, bias))


def modulate_backward(grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Grads:
    """Gradients of x, shift and scale."""
    dx, sums = _norm_backward(grad, x, 1 + scale, x.shape[1], True, eps)
    return dx, sums[:, 1], sums[:, 0]


def silu_mul_backward(grad: Tensor, x: Tensor) -> Grads:
    """Gradient of x."""
    return (torch.ops.kelix.silu_mul_backward(_rows(grad), _rows(x)).view(x.shape),)


def relu_linear_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    head_dim: int,
    norm_eps: float,
    eps: float,
) -> Grads:
    """Gradients of qkv, q_norm and k_norm."""
    core = torch.ops.kelix.relu_linear_attention_backward
    if q_norm is None or k_norm is None:
        return core(grad, qkv, head_dim, eps), None, None
    q, k, v = (part.contiguous() for part in qkv.chunk(3, dim=-1))
    normed = [torch.ops.kelix.rms_norm(*pair, norm_eps) for pair in ((q, q_norm), (k, k_norm))]
    of_q, of_k, of_v = core(grad, torch.cat((*normed, v), -1), head_dim, eps).chunk(3, dim=-1)
    dq, of_q_norm = rms_norm_backward(of_q, q, q_norm, norm_eps)
    dk, of_k_norm = rms_norm_backward(of_k, k, k_norm, norm_eps)
    assert dq is not None and dk is not None
    return torch.cat((dq, dk, of_v), -1), of_q_norm, of_k_norm


def depthwise_glu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, pre_act: int, gate_act: int
) -> Grads:
    """Gradients of x, weight and bias."""
    dx, dweight, dbias = torch.ops.kelix.depthwise_glu_backward(
        grad, x, weight, bias, pre_act, gate_act
    )
    return dx, dweight.sum(0), dbias.sum(0)


def _of_those_given(grads: Iterable[Tensor], tensors: Iterable[Tensor | None]) -> Grads:
    return tuple(g if t is not None else None for g, t in zip(grads, tensors, strict=True))


def _norm_backward(
    grad: Tensor, x: Tensor, gain: Tensor | None, group: int, centred: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """dx, and sums [groups, 2, D] of grad * normed(x) and of grad over each group of rows.

    group: rows that share a row of `gain`, 0 for all.
    """
    rows = _rows(x)
    dx, sums = torch.ops.kelix.norm_backward(
        _rows(grad), rows, gain, group or len(rows), centred, eps
    )
    return dx.view(x.shape), sums.sum(1)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@register_fake("norm_backward")
def _norm_backward_fake(
    grad: Tensor, x: Tensor, gain: Tensor | None, group: int, centred: bool, eps: float
) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    return x.new_empty(x.shape), x.new_empty((rows // group, -(-group // _PIECE), 2, cols))


@register_fake("silu_mul_backward")
def _silu_mul_backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("relu_linear_attention_backward")
def _relu_linear_attention_backward_fake(
    grad: Tensor, qkv: Tensor, head_dim: int, eps: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


@register_fake("depthwise_glu_backward")
def _depthwise_glu_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, pre_act: int, gate_act: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(x)
    return (
        x.new_empty(x.shape),
        weight.new_empty((batch, *weight.shape)),
        bias.new_empty((batch, *bias.shape)),
    )
