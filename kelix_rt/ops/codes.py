"""Codes of the image tokenizer and embeddings of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from kelix_rt.ops import _codes_forms as forms
from kelix_rt.ops._autograd import differentiate
from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._wide import wide
from kelix_rt.ops.norm import layer_norm_ref


def codebook_norms(codebooks: Tensor, reference: bool = False) -> Tensor:
    """Squared lengths of the code vectors, float32, as `nearest_codes` wants them.

    codebooks: [N, K, d]. With `reference`, the squares and their sum are rounded to the codebooks'
    dtype, as the released model's distance computation does. Returns [N, K].
    """
    if not reference:
        return codebooks.float().square().sum(-1)
    squares = codebooks.square().float()
    return squares.sum(-1).to(codebooks.dtype).float()


def nearest_codes(
    z: Tensor,
    codebooks: Tensor,
    norms: Tensor,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    reference: bool = False,
) -> Tensor:
    """Index of the nearest code of every sub-codebook for every token.

    z: [T, N, d]. codebooks: [N, K, d], same dtype. norms: [N, K] float32 from `codebook_norms`
        with the same `reference`.
    ln_weight, ln_bias: [N, d], both or neither: z is normalised first (LayerNorm per sub-codebook,
        rounded to z's dtype).
    Exact mode: ``argmin_k norms_k - 2 z . C_k`` in float32. reference=True repeats the released
    model's cdist with its roundings to z's dtype: ``nz = round(sum round(z^2))``,
    ``s = nz + norms_k - 2 z . C_k`` in float32, ``r = round(s)``, ``u = round(sqrt(max(r, 0)))``,
    ``distance = round(u^2)``; in bfloat16 many distances tie. The lowest index wins a tie.
    Returns [T, N] int64; a row with NaN gives 0. After `tune_nearest_codes` calls of the shapes it
    was given take the form that was fastest.
    """
    inputs = (z, codebooks, norms, ln_weight, ln_bias, eps, reference)
    # A compiled call is one for all sizes, so no form chosen for some of them.
    if forms.CHOSEN and z.dim() == 3 and not torch.compiler.is_compiling():
        choice = forms.CHOSEN.get(forms.key_of(*inputs[:5], reference))
        if choice is not None:
            return choice.form(*inputs)
    return torch.ops.kelix.nearest_codes(*inputs)


def nearest_codes_ref(
    z: Tensor,
    codebooks: Tensor,
    norms: Tensor,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    reference: bool = False,
) -> Tensor:
    """Plain-torch `nearest_codes`."""
    if ln_weight is not None:
        z = layer_norm_ref(z, ln_weight, ln_bias, eps)
    dots = torch.einsum("tnd,nkd->tnk", wide(z), wide(codebooks))
    if reference:
        squares = wide(z.square()).sum(-1, keepdim=True).to(z.dtype)
        score = wide(squares) + norms - 2 * dots
        root = score.to(z.dtype).clamp(min=0).sqrt()
        distance = root.square()
    else:
        distance = norms - 2 * dots
    columns = torch.arange(distance.shape[-1], device=z.device)
    at_min = distance == distance.amin(-1, keepdim=True)
    first = torch.where(at_min, columns, distance.shape[-1]).amin(-1)
    return torch.where(first == distance.shape[-1], 0, first)


@register_fake("nearest_codes")
def _nearest_codes_fake(
    z: Tensor,
    codebooks: Tensor,
    norms: Tensor,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    reference: bool = False,
) -> Tensor:
    return z.new_empty((z.shape[0], z.shape[1]), dtype=torch.int64)


def block_embed(ids: Tensor, table: Tensor, text_vocab: int, block_end: int) -> Tensor:
    """The backbone's input: a block is the sum of the embeddings before its end-of-block id.

    ids: [P, N + 1] int64. table: [VT, D]. With m the number of ids before the first `block_end`
    (at most N): a visual row (first id >= text_vocab) gives the sum of its first m embeddings, a
    text row m times its first embedding, a row that starts with `block_end` zero.
    Returns [P, D], dtype of table; float32 sum, one rounding.
    """
    return torch.ops.kelix.block_embed(ids, table, text_vocab, block_end)


def block_embed_ref(ids: Tensor, table: Tensor, text_vocab: int, block_end: int) -> Tensor:
    """Plain-torch `block_embed`."""
    codes = ids[:, :-1]
    before_end = (codes == block_end).cumsum(-1) == 0
    looked_up = torch.where(ids[:, :1] >= text_vocab, codes, ids[:, :1])
    looked_up = looked_up.where(before_end, 0)  # behind the end anything may stand
    rows = wide(table[looked_up]) * before_end.unsqueeze(-1)
    return rows.sum(1).to(table.dtype)


@register_fake("block_embed")
def _block_embed_fake(ids: Tensor, table: Tensor, text_vocab: int, block_end: int) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]))


differentiate("block_embed", block_embed_ref, autocast=False)
