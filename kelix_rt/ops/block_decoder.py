"""The in-block loop: from one backbone state to the ids of the next block.

A small causal transformer (the Block Decoder) sees the backbone state and then the embedding of
each id of the block drawn so far; the backbone's final norm and output head turn its output into
logits. Only the ids that can continue a well-formed block are scored: text ids and the first
sub-codebook at slot 0, one sub-codebook at a later slot of a visual block, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._wide import wide
from kelix_rt.ops.norm import rms_norm_ref
from kelix_rt.ops.sampling import sample_blocks_ref

LAYER_NORM_EPS = 1e-5
_ALIGN = 64  # elements: every packed tensor starts on a 128-byte (16-bit) boundary


@dataclass(frozen=True)
class BlockDecoderShape:
    """Sizes of a Block Decoder, and where each of its tensors lies in the packed weights."""

    d_model: int
    num_heads: int
    num_layers: int
    ffn: int
    input_dim: int
    num_slots: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor, in packed order. Linear weights are [out, in]."""
        d, width, ffn = self.d_model, self.input_dim, self.ffn
        yield "input_linear.weight", (d, width)
        yield "input_linear.bias", (d,)
        yield "position_embedding.weight", (self.num_slots, d)
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}."
            yield prefix + "sa_norm.weight", (d,)
            yield prefix + "sa_norm.bias", (d,)
            yield prefix + "qkv.weight", (3 * d, d)
            yield prefix + "qkv.bias", (3 * d,)
            yield prefix + "output.weight", (d, d)
            yield prefix + "output.bias", (d,)
            yield prefix + "mlp_norm.weight", (d,)
            yield prefix + "mlp_norm.bias", (d,)
            yield prefix + "gate_up.weight", (2 * ffn, d)
            yield prefix + "down.weight", (d, ffn)
        yield "output_linear.weight", (width, d)
        yield "output_linear.bias", (width,)

    def layout(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(name, shape, first element) of every tensor; starts are multiples of 64 elements."""
        start = 0
        for name, shape in self.tensors():
            yield name, shape, start
            start += -(-math.prod(shape) // _ALIGN) * _ALIGN

    @property
    def packed_size(self) -> int:
        """Elements of the packed weights, padding included."""
        return sum(-(-math.prod(shape) // _ALIGN) * _ALIGN for _, shape in self.tensors())


def block_decoder_shape(state: Mapping[str, Tensor], num_heads: int) -> BlockDecoderShape:
    """Reads the sizes off the tensors; only the number of heads is not in them."""
    return BlockDecoderShape(
        d_model=state["input_linear.weight"].shape[0],
        num_heads=num_heads,
        num_layers=sum(name.endswith(".qkv.weight") for name in state),
        ffn=state["layers.0.down.weight"].shape[1],
        input_dim=state["input_linear.weight"].shape[1],
        num_slots=state["position_embedding.weight"].shape[0],
    )


def pack_block_decoder(state: Mapping[str, Tensor]) -> Tensor:
    """One contiguous 1-D tensor of all weights, in the order and at the starts of the layout.

    state: the names of `BlockDecoderShape.tensors`; ``qkv`` holds q, k, v in that order along
    dim 0, ``gate_up`` the gate and then the up projection; position_embedding has exactly the
    N + 1 rows that are used. All tensors share one dtype and device, the result's. Padding is 0.
    Raises ValueError for a tensor of another shape or dtype.
    """
    shape = block_decoder_shape(state, num_heads=1)
    packed = state["input_linear.weight"].new_zeros(shape.packed_size)
    for name, view in unpack_block_decoder(packed, shape).items():
        own = state[name]
        if own.shape != view.shape or own.dtype != view.dtype:
            raise ValueError(
                f"pack_block_decoder: {name} must be {view.dtype} of shape {list(view.shape)}, got "
                f"{own.dtype} of {list(own.shape)}"
            )
        view.copy_(own)
    return packed


def unpack_block_decoder(packed: Tensor, shape: BlockDecoderShape) -> dict[str, Tensor]:
    """Views into packed weights, by name."""
    return {
        name: packed[start : start + math.prod(size)].view(size)
        for name, size, start in shape.layout()
    }


def block_decode(
    hidden: Tensor,
    weights: Tensor,
    table: Tensor,
    head_norm: Tensor,
    head: Tensor,
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    num_codes: int,
    text_vocab: int,
    block_end: int,
    banned_id: int,
    d_model: int,
    num_heads: int,
    num_layers: int,
    ffn: int,
    norm_eps: float = 1e-6,
    head_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one block per row, slot by slot, each id conditioned on the ids before it.

    hidden: [B, D], the backbone's residual stream before its final norm.
    weights: packed by `pack_block_decoder`. table: [VT, D] id embeddings. head: [VT, D].
    head_norm: [D], weight of the RMSNorm (norm_eps) in front of the head.
    params: [B, N + 1, 4] float32, seeds and steps: [B] int64, as in `sample_blocks`, with the slot
        number as its slot.
    num_codes: N. text_vocab: V. The codes of slot j are ids ``[V + j K, V + (j + 1) K)`` with
        ``K = (VT - V) / N``. block_end: Q. banned_id: never drawn at slot 0; -1 for none.
    hidden, weights, table, head_norm and head share one dtype. head_scale: [VT] float32; head is
    then int8 (`kelix_rt.quantization.quantize_int8`), and a logit is multiplied by its row's scale.

    Slot j reads ``u_0 = hidden``, ``u_j = table[id_{j-1}]`` and attends to slots 0..j:
    ``x = W_in u + b_in + P[j]``; per layer (LayerNorm eps 1e-5) ``x += Wo attention(LN x) + bo``
    and ``x += W_down(silu(gate) * up)`` of LN x; ``z = W_out x + b_out + u``; logits are
    ``head . rms_norm(z)``. Slot 0 admits [0, V + K) without banned_id. A text id t there gives the
    row ``t Q .. Q``, and Q gives all Q. Otherwise slots 1..N-1 admit their own sub-codebook
    (`sample_blocks` on that slice, first_id its first id) and slot N is Q.
    Arithmetic is float32 with no rounding on the way except that of the GEMM inputs, which may be
    rounded to the dtype; logits stay float32.

    Returns ids [B, N + 1] int64 and logprobs [B, N + 1] float32, each under the softmax over the
    admitted ids of its slot; 0 where Q is forced. From a slot whose logits are not finite onwards a
    row holds id -1 and log-probability NaN.
    """
    return torch.ops.kelix.block_decode(
        hidden, weights, table, head_norm, head, params, seeds, steps, num_codes, text_vocab,
        block_end, banned_id, d_model, num_heads, num_layers, ffn, norm_eps, head_scale,
    )  # fmt: skip


def decoder_states(inputs: Tensor, state: Mapping[str, Tensor], num_heads: int) -> Tensor:
    """Block Decoder outputs of whole slot sequences, in plain differentiable torch.

    inputs: [B, n, D] with n <= N + 1: the backbone state, then id embeddings. state: unpacked
    weights in the dtype of inputs. Returns [B, n, D]: the outputs, residual added, before the norm.
    """
    batch, length, _ = inputs.shape
    x = F.linear(inputs, state["input_linear.weight"], state["input_linear.bias"])
    x = x + state["position_embedding.weight"][:length]
    width = x.shape[-1]
    for layer in range(sum(name.endswith(".qkv.weight") for name in state)):
        own = {k.removeprefix(f"layers.{layer}."): v for k, v in state.items()}
        y = F.layer_norm(x, (width,), own["sa_norm.weight"], own["sa_norm.bias"], LAYER_NORM_EPS)
        qkv = F.linear(y, own["qkv.weight"], own["qkv.bias"])
        q, k, v = qkv.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x + F.linear(mixed, own["output.weight"], own["output.bias"])
        y = F.layer_norm(x, (width,), own["mlp_norm.weight"], own["mlp_norm.bias"], LAYER_NORM_EPS)
        gate, up = F.linear(y, own["gate_up.weight"]).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, own["down.weight"])
    out = F.linear(x, state["output_linear.weight"], state["output_linear.bias"])
    return out + inputs


def block_decode_ref(
    hidden: Tensor,
    weights: Tensor,
    table: Tensor,
    head_norm: Tensor,
    head: Tensor,
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    num_codes: int,
    text_vocab: int,
    block_end: int,
    banned_id: int,
    d_model: int,
    num_heads: int,
    num_layers: int,
    ffn: int,
    norm_eps: float = 1e-6,
    head_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain-torch `block_decode`: recomputes slots 0..j at every slot."""
    shape = BlockDecoderShape(d_model, num_heads, num_layers, ffn, hidden.shape[1], num_codes + 1)
    state = unpack_block_decoder(wide(weights), shape)
    codes = (head.shape[0] - text_vocab) // num_codes
    batch = hidden.shape[0]
    ids = torch.full((batch, num_codes + 1), block_end, device=hidden.device)
    logprobs = torch.zeros(batch, num_codes + 1, device=hidden.device)
    inputs = wide(hidden).unsqueeze(1)
    for slot in range(num_codes):
        first = 0 if slot == 0 else text_vocab + slot * codes
        last = text_vocab + (slot + 1) * codes
        out = decoder_states(inputs, state, num_heads)[:, -1]
        normed = rms_norm_ref(out, wide(head_norm), norm_eps)
        logits = normed @ wide(head[first:last]).t()
        if head_scale is not None:
            logits = logits * head_scale[first:last]
        if slot == 0 and banned_id >= 0:
            logits[:, banned_id] = -math.inf
        row_slots = torch.full_like(seeds, slot)
        drawn, drawn_logprobs = sample_blocks_ref(
            logits, params[:, slot], seeds, steps, row_slots, first
        )
        if slot == 0:
            visual = drawn >= text_vocab
            failed = drawn < 0
            ids[:, 0], logprobs[:, 0] = drawn, drawn_logprobs
        else:
            active = visual & ~failed
            ids[active, slot] = drawn[active]
            logprobs[active, slot] = drawn_logprobs[active]
            failed = failed | (active & (drawn < 0))
        ids[failed, slot + 1 :] = -1
        logprobs[failed, slot + 1 :] = math.nan
        previous = wide(table[drawn.clamp(min=0)]).unsqueeze(1)
        inputs = torch.cat((inputs, previous), dim=1)
    return ids, logprobs


@register_fake("block_decode")
def _block_decode_fake(
    hidden: Tensor,
    weights: Tensor,
    table: Tensor,
    head_norm: Tensor,
    head: Tensor,
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    num_codes: int,
    text_vocab: int,
    block_end: int,
    banned_id: int,
    d_model: int,
    num_heads: int,
    num_layers: int,
    ffn: int,
    norm_eps: float = 1e-6,
    head_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    size = (hidden.shape[0], num_codes + 1)
    return hidden.new_empty(size, dtype=torch.int64), hidden.new_empty(size, dtype=torch.float32)
