"""The layers of a SANA block: self-attention, cross-attention, feed-forward, and their order.

All of them keep tokens as [B, N, C]; 1x1 convolutions are Linear layers, so nothing is permuted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kelix_rt import ops
from kelix_rt.config import SanaConfig
from kelix_rt.models.dit_positions import rotate
from kelix_rt.models.layers import add, gated_add
from kelix_rt.models.products import Linear
from kelix_rt.ops.diffusion import ACT_GELU, ACT_NONE, ACT_SILU

NORM_EPS = 1e-6  # the affine-free LayerNorms of blocks and final layer
QK_EPS = 1e-5

Rotary = tuple[Tensor, Tensor]


def activation_code(name: str | None) -> int:
    """The native code of a config's activation; the release takes any other name as identity."""
    return {"silu": ACT_SILU, "gelu": ACT_GELU}.get(name or "", ACT_NONE)


def _vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))


class LinearSelfAttention(nn.Module):
    """ReLU linear attention over all image tokens; `normed`: q and k RMS-normed over all heads."""

    def __init__(self, width: int, head_dim: int, normed: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)
        self.q_norm = _vector(width) if normed else None
        self.k_norm = _vector(width) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        mixed = ops.relu_linear_attention(
            self.qkv(x), self.q_norm, self.k_norm, self.head_dim, QK_EPS
        )
        return self.proj(mixed)


class SoftmaxSelfAttention(nn.Module):
    """Softmax attention over all image tokens; `normed`: q and k LayerNormed over all heads."""

    def __init__(self, width: int, num_heads: int, normed: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.q_norm = _vector(width) if normed else None
        self.k_norm = _vector(width) if normed else None
        self.q_norm_bias = _vector(width) if normed else None
        self.k_norm_bias = _vector(width) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None:
            q = ops.layer_norm(q.contiguous(), self.q_norm, self.q_norm_bias, QK_EPS)
            k = ops.layer_norm(k.contiguous(), self.k_norm, self.k_norm_bias, QK_EPS)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from image tokens to the condition, whose keys and values are made once."""

    def __init__(self, width: int, num_heads: int, normed: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.q_norm = _vector(width) if normed else None
        self.k_norm = _vector(width) if normed else None

    def keys_values(self, y: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """y [B, L, C] -> keys and values [B, heads, L, D]; rotary turns the keys."""
        keys, values = (part.contiguous() for part in self.kv(y).chunk(2, dim=-1))
        if self.k_norm is not None:
            keys = ops.rms_norm(keys, self.k_norm, QK_EPS)
        return self._heads(keys, rotary), self._heads(values, None)

    def _heads(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, -1))
        if rotary is not None:
            x = rotate(x, *rotary)
        return x.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        rotary: Rotary | None,
    ) -> Tensor:
        """x [B, N, C]; keys, values [B, heads, L, D]; mask [B, 1, 1, L] bool or None."""
        q = self.q(x)
        if self.q_norm is not None:
            q = ops.rms_norm(q, self.q_norm, QK_EPS)
        q = self._heads(q, rotary)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class GatedConvFeedForward(nn.Module):
    """Expand to 2M, depthwise 3x3 with a gate down to M, project back (Mix-FFN of SANA).

    This is where tokens learn their place: the self-attention has no positions.
    """

    def __init__(self, width: int, inner: int, acts: tuple[str | None, ...]) -> None:
        super().__init__()
        self.pre_act, self.gate_act, self.out_act = (activation_code(name) for name in acts)
        self.expand = Linear(width, 2 * inner)
        self.depth_weight = nn.Parameter(torch.empty(2 * inner, 3, 3))
        self.depth_bias = _vector(2 * inner)
        self.point = Linear(inner, width, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x [B, h * w, C] with grid (h, w) -> [B, h * w, C]."""
        planes = self.expand(x).unflatten(1, grid)
        gated = ops.depthwise_glu(
            planes, self.depth_weight, self.depth_bias, self.pre_act, self.gate_act
        )
        out = self.point(gated.flatten(1, 2))
        if self.out_act == ACT_NONE:
            return out
        return F.silu(out) if self.out_act == ACT_SILU else F.gelu(out)


class FeedForward(nn.Module):
    """Two Linear layers with GELU (tanh) between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner)
        self.fc2 = Linear(inner, width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x [B, N, C] -> [B, N, C]; the grid plays no part."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and last are modulated."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        inner = int(width * config.mlp_ratio)
        self.normed_cross_input = config.cross_attn_x_norm
        self.attn: nn.Module = (
            LinearSelfAttention(width, config.linear_head_dim, config.qk_norm)
            if config.attn_type == "linear"
            else SoftmaxSelfAttention(width, heads, config.qk_norm)
        )
        self.cross = CrossAttention(width, heads, config.cross_norm)
        self.mlp: nn.Module = (
            GatedConvFeedForward(width, inner, config.mlp_acts)
            if config.ffn_type == "glumbconv"
            else FeedForward(width, inner)
        )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        grid: tuple[int, int],
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        rotary: Rotary | None,
    ) -> Tensor:
        """x [B, N, C] -> the same; x is overwritten unless gradients are needed.

        modulation [6, B, C]: shift, scale, gate of the self-attention, then of the feed-forward.
        """
        attended = self.attn(ops.modulate(x, modulation[0], modulation[1], NORM_EPS))
        x = gated_add(x, modulation[2], attended)
        query = ops.layer_norm(x, None, None, NORM_EPS) if self.normed_cross_input else x
        x = add(x, self.cross(query, keys, values, mask, rotary))
        fed = self.mlp(ops.modulate(x, modulation[3], modulation[4], NORM_EPS), grid)
        return gated_add(x, modulation[5], fed)
