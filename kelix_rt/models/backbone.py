"""The Qwen3 backbone over blocks: a dense causal transformer with a paged key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.config import QwenConfig
from kelix_rt.errors import InputError
from kelix_rt.weights import Source


@dataclass(frozen=True)
class StepContext:
    """Where the T positions of one step belong: B requests laid end to end.

    positions: [T] int32 position in the request. slots: [T] int64 flat cache slot, ``page id *
    page_size + offset``, -1 to store nothing. page_table: [B, max_pages] int32. context_lens: [B]
    int32 tokens of each request once this step is stored. query_start: [B + 1] int32 first row.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    context_lens: Tensor
    query_start: Tensor

    @classmethod
    def of_chunks(
        cls,
        pages: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> StepContext:
        """Context of one chunk per request: positions ``start .. start + count`` over its pages."""
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        for own, start, count in zip(pages, starts, counts, strict=True):
            chunk = range(start, start + count)
            positions.extend(chunk)
            slots.extend(own[p // page_size] * page_size + p % page_size for p in chunk)
            query_start.append(len(positions))
        width = max(map(len, pages), default=0)
        table = [[*own, *[0] * (width - len(own))] for own in pages]
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        return cls(
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            page_table=torch.tensor(table, dtype=torch.int32, device=device),
            context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_start=torch.tensor(query_start, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of all layers, each [L, pages, KV heads, page_size, head_dim]."""

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(
        cls,
        config: QwenConfig,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PagedKV:
        """A zeroed cache of num_pages pages of page_size positions."""
        shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
        k = torch.zeros(shape, dtype=dtype, device=device)
        return cls(k, torch.zeros_like(k))

    @staticmethod
    def page_bytes(config: QwenConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes over all layers, keys and values together."""
        per_position = config.num_layers * config.num_kv_heads * config.head_dim
        return 2 * per_position * page_size * dtype.itemsize

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return self.k.shape[3]


def rope_table(config: QwenConfig, device: torch.device | str = "cpu") -> Tensor:
    """cos | sin of every position, [max_seq_len, head_dim] float32.

    Angles are float32 products as in the release, so long positions carry the same roundings.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_base ** (half / config.head_dim)
    positions = torch.arange(config.max_seq_len, dtype=torch.float32, device=device)
    angles = positions.unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention; q and k are normalised per head before RoPE where configured."""

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.eps = config.norm_eps
        rows = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.sizes = tuple(heads * config.head_dim for heads in rows)
        self.qkv = nn.Linear(config.embed_dim, sum(self.sizes), bias=False)
        self.output = nn.Linear(self.sizes[0], config.embed_dim, bias=False)
        # Each bias has its own flag in the config, so they cannot be one fused vector.
        self.biases = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(size))
                for name, size in zip("qkv", self.sizes, strict=True)
                if getattr(config, f"{name}_proj_bias")
            }
        )
        for name, used in (("q_norm", config.q_norm), ("k_norm", config.k_norm)):
            weight = nn.Parameter(torch.empty(config.head_dim)) if used else None
            self.register_parameter(name, weight)

    def forward(self, x: Tensor, ctx: StepContext, cos_sin: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x: [T, D] normed. k, v: one layer's cache, written in place. Returns [T, D]."""
        qkv = self.qkv(x)
        for part, name in zip(qkv.split(self.sizes, dim=-1), "qkv", strict=True):
            if name in self.biases:
                part.add_(self.biases[name])
        q = ops.rope_store_kv(
            qkv, self.q_norm, self.k_norm, cos_sin, ctx.positions, ctx.slots, k, v,
            self.num_heads, self.eps,
        )  # fmt: skip
        mixed = ops.paged_attention(
            q, k, v, ctx.page_table, ctx.context_lens, ctx.query_start, self.head_dim**-0.5
        )
        return self.output(mixed.flatten(1))


class DecoderLayer(nn.Module):
    """Weights of one pre-norm layer; `Backbone` fuses its norms with the residual additions."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        width, ffn = config.embed_dim, config.intermediate_dim
        self.sa_norm = nn.Parameter(torch.empty(width))
        self.attention = Attention(config)
        self.mlp_norm = nn.Parameter(torch.empty(width))
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU feed-forward, [T, D] -> [T, D]."""
        return F.linear(ops.silu_mul(self.gate_up(x)), self.down.weight)


class Backbone(nn.Module):
    """All layers, and the final norm's weight, which only the output head uses."""

    cos_sin: Tensor

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.empty(config.embed_dim))
        self.register_buffer("cos_sin", torch.empty(0), persistent=False)

    def prepare(self, device: torch.device | str) -> None:
        """Computes the RoPE table; call once, after the weights are loaded."""
        self.cos_sin = rope_table(self.config, device)

    def forward(
        self, embeds: Tensor, ctx: StepContext, kv: PagedKV, keep: list[Tensor] | None = None
    ) -> Tensor:
        """embeds: [T, D] -> [T, D], the residual stream after the last layer, not yet normed.

        Writes the positions' keys and values into kv. Every position must be below max_seq_len.
        keep: receives a copy of the input of every layer.
        """
        eps = self.config.norm_eps
        residual = embeds.clone(memory_format=torch.contiguous_format)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            if update is None:
                x = ops.rms_norm(residual, layer.sa_norm, eps)
            else:
                x = ops.add_rms_norm(residual, update, layer.sa_norm, eps)
            if keep is not None:
                keep.append(residual.clone())
            x = layer.attention(x, ctx, self.cos_sin, kv.k[index], kv.v[index])
            x = ops.add_rms_norm(residual, x, layer.mlp_norm, eps)
            update = layer.mlp(x)
        return residual if update is None else residual.add_(update)

    def run_whole(self, embeds: Tensor, keep: list[Tensor] | None = None) -> Tensor:
        """`forward` over one whole sequence [S, D] with a cache of its own.

        Raises InputError when S exceeds max_seq_len.
        """
        length = embeds.shape[0]
        limit = self.config.max_seq_len
        if length > limit:
            raise InputError(f"backbone: a prompt must have at most {limit} blocks, got {length}")
        page_size = 16
        num_pages = -(-length // page_size)
        kv = PagedKV.allocate(self.config, num_pages, page_size, embeds.device, embeds.dtype)
        ctx = StepContext.of_chunks([range(num_pages)], [0], [length], page_size, embeds.device)
        return self.forward(embeds, ctx, kv, keep)


def weight_map(config: QwenConfig) -> dict[str, Source]:
    """Backbone tensors by parameter name; q|k|v and gate|up are fused along dim 0."""
    sources = {"norm": Source(("model.model.norm.scale",))}
    for index in range(config.num_layers):
        stored, own = f"model.model.layers.{index}.", f"layers.{index}."
        attn = stored + "attn."
        sources |= {
            own + "sa_norm": Source((stored + "sa_norm.scale",)),
            own + "mlp_norm": Source((stored + "mlp_norm.scale",)),
            own + "attention.qkv.weight": Source(
                tuple(f"{attn}{name}_proj.weight" for name in "qkv")
            ),
            own + "attention.output.weight": Source((attn + "output_proj.weight",)),
            own + "gate_up.weight": Source((stored + "mlp.w1.weight", stored + "mlp.w3.weight")),
            own + "down.weight": Source((stored + "mlp.w2.weight",)),
        }
        for name in "qkv":
            if getattr(config, f"{name}_proj_bias"):
                sources[f"{own}attention.biases.{name}"] = Source((f"{attn}{name}_proj.bias",))
        for name in ("q_norm", "k_norm"):
            if getattr(config, name):
                sources[f"{own}attention.{name}"] = Source((f"{attn}{name}.scale",))
    return sources
