"""Parts of the vision tokenizer: transformer layer, patch merger, norms with weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.config import VisionConfig
from kelix_rt.models.products import Linear
from kelix_rt.models.vision_layout import PATCHES_PER_TOKEN, PatchLayout, rotate

MERGER_EPS = 1e-5
SCORES_AT_ONCE = 1 << 20  # 4 MB of float32: they stay in the cache between product and softmax

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


def activation(name: str) -> Activation:
    """The MLP's activation; as in the release, an unknown name means tanh GELU."""
    known: dict[str, Activation] = {"silu": F.silu, "gelu": F.gelu}
    return known.get(name, gelu_tanh)


class LayerNorm(nn.Module):
    """`ops.layer_norm` with its weights."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class VisionAttention(nn.Module):
    """Multi-head attention with 2-D RoPE; every image attends to itself only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = Linear(config.hidden_size, config.hidden_size)
        self.norm_eps = config.qk_norm_eps
        self.q_norm: nn.Parameter | None = None
        self.k_norm: nn.Parameter | None = None
        if config.use_qk_norm:
            self.q_norm = nn.Parameter(torch.empty(self.head_dim))
            self.k_norm = nn.Parameter(torch.empty(self.head_dim))

    def rotated(self, x: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> q, k (after RoPE, before their norms) and v, each [N, heads, hd]."""
        qkv = self.qkv(x).view(x.shape[0], 3 * self.heads, self.head_dim)
        turned = rotate(qkv[:, : 2 * self.heads], layout.cos, layout.sin)
        return turned[:, : self.heads], turned[:, self.heads :], qkv[:, 2 * self.heads :]

    def forward(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """[N, D] -> [N, D]."""
        q, k, v = self.rotated(x, layout)
        if self.q_norm is not None and self.k_norm is not None:
            q = ops.rms_norm(q, self.q_norm, self.norm_eps)
            k = ops.rms_norm(k, self.k_norm, self.norm_eps)
        return self.output(segment_attention(q, k, v, layout.lengths).flatten(1))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Softmax attention within consecutive segments of [N, heads, hd]; returns the same shape."""
    if len(set(lengths)) == 1:
        batch = (len(lengths), lengths[0], *q.shape[1:])
        return _attend(q.reshape(batch), k.reshape(batch), v.reshape(batch)).reshape(q.shape)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_attend(a[None], b[None], c[None])[0] for a, b, c in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    rounded = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    attend = _rounded_attention if rounded else F.scaled_dot_product_attention
    return attend(q, k, v).transpose(1, 2)


def _rounded_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of 16-bit [B, heads, S, hd] with the released roundings: scores, softmax and sums
    in float32, only the probabilities rounded (spec: tokenizer, 3.2). torch's own kernel for CPUs
    rounds them before they are divided by their sum, which changes codes."""
    heads = zip(*(x.flatten(0, 1).float() for x in (q, k, v)), strict=True)
    scale = q.shape[-1] ** -0.5
    parts = [_attend_head(a * scale, b.mT, c, q.dtype) for a, b, c in heads]
    return torch.stack(parts).view(q.shape)


def _attend_head(q: Tensor, keys: Tensor, v: Tensor, rounded: torch.dtype) -> Tensor:
    some = q.split(max(1, SCORES_AT_ONCE // keys.shape[1]))
    parts = [(x @ keys).softmax(dim=-1).to(rounded).float() @ v for x in some]
    return torch.cat(parts).to(rounded)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with a plain (ungated) MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = LayerNorm(width, config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = LayerNorm(width, config.layer_norm_eps)
        self.up = Linear(width, config.intermediate_size)
        self.down = Linear(config.intermediate_size, width)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """[N, D] -> [N, D]."""
        x = x + self.attention(self.attention_norm(x), layout)
        return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class PatchMerger(nn.Module):
    """2x2 patches -> one token: LayerNorm of the four, Linear, GELU (erf), Linear."""

    def __init__(self, width: int, output: int) -> None:
        super().__init__()
        joined = PATCHES_PER_TOKEN * width
        self.norm = LayerNorm(joined, MERGER_EPS)
        self.inner = Linear(joined, joined)
        self.outer = Linear(joined, output)

    def forward(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """[N, D] -> [N / 4, output], tokens in raster order of the merged grid."""
        joined = x[layout.merge_order].view(-1, PATCHES_PER_TOKEN * x.shape[1])
        return self.outer(F.gelu(self.inner(self.norm(joined))))
