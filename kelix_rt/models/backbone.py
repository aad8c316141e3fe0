"""The Qwen3 backbone over blocks: a dense causal transformer with a paged key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.config import QwenConfig
from kelix_rt.errors import InputError
from kelix_rt.models.layers import (
    Projection,
    add,
    add_and_norm,
    linear,
    needs_grad,
    quantize_linears,
)
from kelix_rt.models.products import Linear
from kelix_rt.models.sequences import PagedKV, StepContext
from kelix_rt.ops.attention import normed_rotated
from kelix_rt.weights import Source


def rope_table(config: QwenConfig, device: torch.device | str = "cpu") -> Tensor:
    """cos | sin of every position, [max_seq_len, head_dim] float32.

    Angles are float32 products as in the release, so long positions carry the same roundings. The
    frequencies are those of the CPU: a GPU's power is another in the last place of some.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = (1.0 / config.rope_base ** (half / config.head_dim)).to(device)
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
        self.qkv: Projection = Linear(config.embed_dim, sum(self.sizes), bias=False)
        self.output: Projection = Linear(self.sizes[0], config.embed_dim, bias=False)
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
        q = ops.rope_store_kv(
            self._project(x), self.q_norm, self.k_norm, cos_sin, ctx.positions, ctx.slots, k, v,
            self.num_heads, self.eps,
        )  # fmt: skip
        mixed = ops.paged_attention(
            q, k, v, ctx.page_table, ctx.context_lens, ctx.query_start, self.head_dim**-0.5
        )
        return linear(mixed.flatten(1), self.output)

    def dense(
        self, x: Tensor, lengths: Sequence[int], positions: Tensor, cos_sin: Tensor
    ) -> Tensor:
        """`forward` of whole sequences without a cache, differentiable. x: [T, D] normed."""
        parts = normed_rotated(
            self._project(x), self.q_norm, self.k_norm, cos_sin, positions, self.num_heads,
            self.head_dim, self.eps,
        )  # fmt: skip
        # One by one: padded to the longest, sequences of unlike lengths cost a CPU twice as much.
        mixed = [
            _causal_attention(*own)
            for own in zip(*(part.split(list(lengths)) for part in parts), strict=True)
        ]
        return self.output(torch.cat(mixed).flatten(1))

    def _project(self, x: Tensor) -> Tensor:
        qkv = linear(x, self.qkv)
        if not self.biases:
            return qkv
        parts = [
            part + self.biases[name] if name in self.biases else part
            for part, name in zip(qkv.split(self.sizes, dim=-1), "qkv", strict=True)
        ]
        return torch.cat(parts, dim=-1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one sequence, all [T, heads, head_dim]."""
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return mixed[0].transpose(0, 1)


class DecoderLayer(nn.Module):
    """Weights of one pre-norm layer; `Backbone` fuses its norms with the residual additions."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        width, ffn = config.embed_dim, config.intermediate_dim
        self.sa_norm = nn.Parameter(torch.empty(width))
        self.attention = Attention(config)
        self.mlp_norm = nn.Parameter(torch.empty(width))
        self.gate_up: Projection = Linear(width, 2 * ffn, bias=False)
        self.down: Projection = Linear(ffn, width, bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU feed-forward, [T, D] -> [T, D]."""
        return linear(ops.silu_mul(linear(x, self.gate_up)), self.down)


class Backbone(nn.Module):
    """All layers, and the final norm's weight, which only the output head uses."""

    cos_sin: Tensor

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.empty(config.embed_dim))
        self.register_buffer("cos_sin", torch.empty(0), persistent=False)

    def quantize(self) -> None:
        """Turns the matrices of all layers into int8 (`Int8Linear`), on the meta device too."""
        quantize_linears(self)

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

        def attend(index: int, attention: Attention, x: Tensor) -> Tensor:
            return attention(x, ctx, self.cos_sin, kv.k[index], kv.v[index])

        return self._run(embeds, attend, keep)

    def run_whole(
        self,
        embeds: Tensor,
        keep: list[Tensor] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """`forward` over whole sequences laid end to end, [T, D], that need no cache given.

        lengths: of the sequences, summing to T; None for one sequence. Differentiable: where
        gradients are needed, attention is dense over each sequence and nothing is overwritten.
        Raises InputError for lengths that do not fit, and above max_seq_len.
        """
        lengths = self._check_lengths(embeds, lengths)
        if needs_grad(embeds, *self.parameters()):
            positions = torch.cat([torch.arange(length) for length in lengths]).to(embeds.device)

            def attend(index: int, attention: Attention, x: Tensor) -> Tensor:
                return attention.dense(x, lengths, positions, self.cos_sin)

            return self._run(embeds, attend, keep)
        page_size = 16
        ends = list(accumulate((-(-length // page_size) for length in lengths), initial=0))
        kv = PagedKV.allocate(self.config, ends[-1], page_size, embeds.device, embeds.dtype)
        pages = [range(begin, end) for begin, end in pairwise(ends)]
        ctx = StepContext.of_chunks(pages, [0] * len(pages), lengths, page_size, embeds.device)
        return self.forward(embeds, ctx, kv, keep)

    def _run(
        self,
        embeds: Tensor,
        attend: Callable[[int, Attention, Tensor], Tensor],
        keep: list[Tensor] | None,
    ) -> Tensor:
        eps = self.config.norm_eps
        residual = embeds.clone(memory_format=torch.contiguous_format)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            if update is None:
                x = ops.rms_norm(residual, layer.sa_norm, eps)
            else:
                residual, x = add_and_norm(residual, update, layer.sa_norm, eps)
            if keep is not None:
                keep.append(residual.clone())
            x = attend(index, layer.attention, x)
            residual, x = add_and_norm(residual, x, layer.mlp_norm, eps)
            update = layer.mlp(x)
        return residual if update is None else add(residual, update)

    def _check_lengths(self, embeds: Tensor, lengths: Sequence[int] | None) -> Sequence[int]:
        total, limit = embeds.shape[0], self.config.max_seq_len
        lengths = [total] if lengths is None else lengths
        if min(lengths, default=0) < 1 or sum(lengths) != total:
            raise InputError(
                f"backbone: lengths must be positive with sum {total}, the rows of embeds, got "
                f"{list(lengths)}"
            )
        if max(lengths) > limit:
            raise InputError(
                f"backbone: a prompt must have at most {limit} blocks, got {max(lengths)}"
            )
        return lengths


def weight_map(config: QwenConfig) -> dict[str, Source]:
    """Backbone tensors by parameter name; q|k|v and gate|up are fused along dim 0."""
    sources = {"norm": Source(("model.model.norm.scale",))}
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    projections = tuple((count * config.head_dim, config.embed_dim) for count in heads)
    for index in range(config.num_layers):
        stored, own = f"model.model.layers.{index}.", f"layers.{index}."
        attn = stored + "attn."
        sources |= {
            own + "sa_norm": Source((stored + "sa_norm.scale",)),
            own + "mlp_norm": Source((stored + "mlp_norm.scale",)),
            own + "attention.qkv.weight": Source(
                tuple(f"{attn}{name}_proj.weight" for name in "qkv"), parts=projections
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
