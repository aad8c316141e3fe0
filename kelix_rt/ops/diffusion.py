"""The non-GEMM work of a SANA block (linear diffusion transformer) and of its Euler sampler.

Storage is float32, bfloat16 or float16; arithmetic is float32 with one rounding per output, except
where a formula below names a rounding. Every op has a plain-torch reference `<op>_ref` of the same
signature; the reference is the definition, the native kernels are measured against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kelix_rt.ops._autograd import differentiate, writes
from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._gradients import (
    depthwise_glu_backward,
    modulate_backward,
    relu_linear_attention_backward,
)
from kelix_rt.ops._wide import wide
from kelix_rt.ops.norm import rms_norm_ref

ACT_NONE, ACT_SILU, ACT_GELU = 0, 1, 2


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift, LN over the last dimension without weight or bias.

    x [B, N, C]; shift, scale [B, C], broadcast over N; all of one dtype. Returns [B, N, C],
    rounded once. The variance is the biased one.
    """
    return torch.ops.kelix.modulate(x, shift, scale, eps)


def modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain-torch reference of `modulate`."""
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=eps)
    return (normed * (1 + wide(scale).unsqueeze(1)) + wide(shift).unsqueeze(1)).to(x.dtype)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> None:
    """x += gate * y in place.

    x [B, N, C] contiguous, mutated; gate [B, C], broadcast over N; y [B, N, C]; all of one dtype.
    Raises RuntimeError where one of them requires a gradient: `gated_sum` has one.
    """
    writes("gated_residual", (x,), gate, y)
    torch.ops.kelix.gated_residual(x, gate, y)


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """What `gated_residual` writes to x, as a new tensor and in plain differentiable torch."""
    return (wide(x) + wide(gate).unsqueeze(1) * wide(y)).to(x.dtype)


def gated_residual_ref(x: Tensor, gate: Tensor, y: Tensor) -> None:
    """Plain-torch reference of `gated_residual`."""
    x.copy_(gated_sum(x, gate, y))


def relu_linear_attention(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    head_dim: int,
    norm_eps: float = 1e-5,
    eps: float = 1e-8,
) -> Tensor:
    """Attention with ReLU features, linear in the number of tokens, without mask.

    qkv [B, N, 3C] holds q, k and v side by side; q_norm, k_norm [C] are weights of an RMSNorm over
    the whole C, before the split into C / head_dim heads (both or none). Per head, in float32:
        S = sum_n k_n^T v_n     z = sum_n k_n     out_n = q_n S / (q_n . z + eps)
    with q and k after norm and ReLU. A query that is all zero gives zero. Returns [B, N, C].
    """
    return torch.ops.kelix.relu_linear_attention(qkv, q_norm, k_norm, head_dim, norm_eps, eps)


def relu_linear_attention_ref(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    head_dim: int,
    norm_eps: float = 1e-5,
    eps: float = 1e-8,
) -> Tensor:
    """Plain-torch reference of `relu_linear_attention`."""
    q, k, v = qkv.chunk(3, dim=-1)
    if q_norm is not None:
        q = rms_norm_ref(q, q_norm, norm_eps)
    if k_norm is not None:
        k = rms_norm_ref(k, k_norm, norm_eps)
    q, k = q.relu(), k.relu()
    q, k, v = (wide(t).unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    state = k.transpose(-1, -2) @ v
    weight = q @ k.sum(2).unsqueeze(-1)
    out = (q @ state) / (weight + eps)
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


def depthwise_glu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_act: int = ACT_SILU,
    gate_act: int = ACT_SILU,
) -> Tensor:
    """A 3x3 depthwise convolution between two activations, folded to half its channels.

    x [B, H, W, 2M] (channels last); weight [2M, 3, 3] in (row, column) order; bias [2M]. With
    y = depthwise(act_pre(x)) + bias, stride 1 and zero padding 1 (the padding is zero after the
    activation): out = y[..., :M] * act_gate(y[..., M:]). Activations: 0 none, 1 SiLU,
    2 GELU (exact, erf). Returns [B, H, W, M].
    """
    return torch.ops.kelix.depthwise_glu(x, weight, bias, pre_act, gate_act)


def _activate(x: Tensor, act: int) -> Tensor:
    if act == ACT_SILU:
        return F.silu(x)
    return F.gelu(x) if act == ACT_GELU else x


def depthwise_glu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_act: int = ACT_SILU,
    gate_act: int = ACT_SILU,
) -> Tensor:
    """Plain-torch reference of `depthwise_glu`."""
    planes = _activate(wide(x), pre_act).permute(0, 3, 1, 2)
    mixed = F.conv2d(
        planes, wide(weight).unsqueeze(1), wide(bias), padding=1, groups=planes.shape[1]
    )
    value, gate = mixed.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return (value * _activate(gate, gate_act)).to(x.dtype).contiguous()


def euler_step(
    latent: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    dt: Tensor,
    guidance: Tensor | None,
) -> None:
    """latent += dt * v with v = uncond + guidance * (velocity - uncond), in place.

    latent [B, ...] float32 contiguous, mutated; velocity and uncond [B, ...] of one storage dtype;
    dt, guidance [B] float32, one per row. uncond and guidance are given together or not at all;
    without them v = velocity.
    """
    writes("euler_step", (latent,), velocity, uncond, dt, guidance)
    torch.ops.kelix.euler_step(latent, velocity, uncond, dt, guidance)


def euler_step_ref(
    latent: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    dt: Tensor,
    guidance: Tensor | None,
) -> None:
    """Plain-torch reference of `euler_step`."""
    per_row = (-1,) + (1,) * (latent.dim() - 1)
    step = wide(velocity)
    if uncond is not None:
        if guidance is None:
            raise ValueError("euler_step: guidance must be given with uncond, got None")
        base = wide(uncond)
        step = base + guidance.view(per_row) * (step - base)
    latent.add_(dt.view(per_row) * step)


@register_fake("modulate")
def _modulate_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("gated_residual")
def _gated_residual_fake(x: Tensor, gate: Tensor, y: Tensor) -> None:
    return None


@register_fake("relu_linear_attention")
def _relu_linear_attention_fake(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    head_dim: int,
    norm_eps: float = 1e-5,
    eps: float = 1e-8,
) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@register_fake("depthwise_glu")
def _depthwise_glu_fake(
    x: Tensor, weight: Tensor, bias: Tensor, pre_act: int = 1, gate_act: int = 1
) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@register_fake("euler_step")
def _euler_step_fake(
    latent: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    dt: Tensor,
    guidance: Tensor | None,
) -> None:
    return None


differentiate("modulate", modulate_ref, modulate_backward)
differentiate("relu_linear_attention", relu_linear_attention_ref, relu_linear_attention_backward)
differentiate("depthwise_glu", depthwise_glu_ref, depthwise_glu_backward)
