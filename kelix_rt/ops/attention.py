"""Attention over a paged key/value cache.

The cache of one layer is two tensors [num_pages, num_kv_heads, page_size, head_dim]. A token's
flat slot is ``page_id * page_size + offset``; a request's page table lists its pages in order.

Both hold the dtype of the queries, or float8_e4m3fn, which takes a byte an element. There is no
scale: a value is rounded to the nearest that float8 has, relative error at most 2^-4 from 2^-6 to
448, absolute error at most 2^-10 below, and beyond +-448 becomes +-448. docs/kernels/attention.md
says what that means for a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kelix_rt.ops._autograd import writes
from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._wide import wide
from kelix_rt.ops.norm import rms_norm_ref


def rope_store_kv(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Per-head RMSNorm and rotary embedding of q and k; writes k and v into the cache.

    qkv: [T, (H + 2 KV) * hd], the fused projection, heads in the order q | k | v.
    q_weight, k_weight: [hd] in qkv's dtype, or None for no norm. The norm comes before RoPE and
        rounds as `rms_norm` does.
    cos_sin: [max_pos, hd] float32, cosines in the first half of a row and sines in the second.
        Half-split layout: ``(x1 cos - x2 sin | x2 cos + x1 sin)``, float32, one rounding.
    positions: [T] int32, the row of cos_sin. slots: [T] int64 flat slots; -1 stores nothing.
    k_cache, v_cache: [P, KV, page, hd], contiguous, written in place. dtype of qkv, where v is
        copied; or both float8_e4m3fn, where k and v are what a cache of qkv's dtype would hold,
        rounded to nearest even once more, saturating at +-448; NaN stays NaN.
    Returns q, [T, H, hd] contiguous.
    """
    writes("rope_store_kv", (k_cache, v_cache), qkv, q_weight, k_weight)
    return torch.ops.kelix.rope_store_kv(
        qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, num_heads, eps
    )


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def normed_rotated(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    num_heads: int,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, hd], k and v [T, KV, hd] as `rope_store_kv` makes them, in differentiable torch."""
    heads = qkv.reshape(qkv.shape[0], qkv.shape[1] // head_dim, head_dim)
    num_kv_heads = (heads.shape[1] - num_heads) // 2
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    q = _rope(q if q_weight is None else rms_norm_ref(q, q_weight, eps), cos, sin)
    k = _rope(k if k_weight is None else rms_norm_ref(k, k_weight, eps), cos, sin)
    return q, k, v


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.float8_e4m3fn:
        return values
    limit = torch.finfo(dtype).max  # torch.to made what lies beyond it NaN in some versions
    return values.clamp(-limit, limit).to(dtype)


def rope_store_kv_ref(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Plain-torch `rope_store_kv`; mutates the caches too."""
    page_size, head_dim = k_cache.shape[2:]
    q, k, v = normed_rotated(qkv, q_weight, k_weight, cos_sin, positions, num_heads, head_dim, eps)
    stored = slots >= 0
    page, offset = slots[stored] // page_size, slots[stored] % page_size
    k_cache[page, :, offset] = _stored(k[stored], k_cache.dtype)
    v_cache[page, :, offset] = _stored(v[stored], v_cache.dtype)
    return q.contiguous()


@register_fake("rope_store_kv")
def _rope_store_kv_fake(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], num_heads, k_cache.shape[3]))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
) -> Tensor:
    """Causal grouped-query attention of a ragged batch over the paged cache.

    q: [T, H, hd]. k_cache, v_cache: [P, KV, page, hd], dtype of q, or both float8_e4m3fn; query
        head h reads KV head ``h // (H / KV)``.
    page_table: [B, max_pages] int32; entries past ``ceil(context / page)`` are never read.
    context_lens: [B] int32, tokens in the cache including this call's. query_start: [B + 1] int32.
        Request b owns rows ``query_start[b]:query_start[b+1]``, the LAST positions of its context:
        row i of n sees the keys ``0 .. context - n + i``. One row: decoding; many: a prefill chunk.
    Returns [T, H, hd], dtype of q; scores and softmax in float32, one rounding. Rows that see no
    key (context 0, as graph padding has) are zero; rows outside every request are unspecified.
    """
    return torch.ops.kelix.paged_attention(
        q, k_cache, v_cache, page_table, context_lens, query_start, scale
    )


def _gather_pages(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """[KV, length, hd] float32 of one request."""
    picked = cache[pages.long()].transpose(0, 1)
    return wide(picked.reshape(cache.shape[1], -1, cache.shape[3])[:, :length])


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
) -> Tensor:
    """Plain-torch `paged_attention`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    group = q.shape[1] // k_cache.shape[1]
    starts = query_start.tolist()
    for row, context in enumerate(context_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end or context == 0:
            continue
        pages = page_table[row, : -(-context // k_cache.shape[2])]
        k = _gather_pages(k_cache, pages, context).repeat_interleave(group, dim=0)
        v = _gather_pages(v_cache, pages, context).repeat_interleave(group, dim=0)
        scores = wide(q[begin:end]).transpose(0, 1) @ k.transpose(1, 2) * scale
        last = torch.arange(context - (end - begin), context, device=q.device)
        hidden = torch.arange(context, device=q.device) > last.unsqueeze(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out


@register_fake("paged_attention")
def _paged_attention_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
