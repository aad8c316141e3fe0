"""Drawing ids from logits, every row with its own parameters and its own random stream.

Random numbers are counter-based (Philox4x32-10, Salmon et al. 2011): the number that a candidate
gets depends on (seed, step, slot, id) alone. A draw is therefore the same in any batch, in any
row, with any slice of the head, and after preemption.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kelix_rt.ops._fake import register_fake
from kelix_rt.ops._wide import wide

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_BELOW_ONE = 1.0 - 2.0**-24


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a 32 x 32 bit product, without leaving int64."""
    low_part = word * (factor & 0xFFFF)
    high_part = word * (factor >> 16)
    carry = (low_part >> 16) + (high_part & 0xFFFF)
    high = (high_part >> 16) + (carry >> 16)
    low = ((carry & 0xFFFF) << 16) | (low_part & 0xFFFF)
    return high & _WORD, low


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. Words are int64 tensors holding values of [0, 2^32); shapes broadcast.

    Known answers of Random123, counter; key and then the output:
    ``0 0 0 0; 0 0``: ``6627e8d5 e169c58d bc57ac4c 9b00dbd8``
    ``ffffffff (four times); ffffffff ffffffff``: ``408f276d 41c83b0e a20bc7c6 6d5451fd``
    ``243f6a88 85a308d3 13198a2e 03707344; a4093822 299f31d0``:
    ``d16cfe09 94fdcceb 5001e420 24126ea1``
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def gumbel_noise(ids: Tensor, seeds: Tensor, steps: Tensor, slots: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of candidates `ids` (int64, all arguments broadcast).

    Word 0 of ``philox(counter = (id, slot, step_lo, step_hi), key = (seed_lo, seed_hi))`` gives
    ``u = min(((word >> 8) + 0.5) * 2^-24, 1 - 2^-24)`` in float32 (the minimum matters: the largest
    word would otherwise round to u = 1, an infinite score); the noise is ``-log(-log(u))``.
    """
    word = philox4x32(
        (ids & _WORD, slots & _WORD, steps & _WORD, (steps >> 32) & _WORD),
        (seeds & _WORD, (seeds >> 32) & _WORD),
    )[0]
    uniform = ((word >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform.clamp(max=_BELOW_ONE)))


def sample_blocks(
    logits: Tensor,
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    slots: Tensor,
    first_id: int = 0,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draws one id per row.

    logits: [R, W], float32, bfloat16 or float16, read as float32; -inf bans a candidate.
    params: [R, 4] float32: temperature, top_k, top_p, min_p. seeds, steps, slots: [R] int64.
    first_id: the id of column 0. A row's kept candidates:

    1. Greedy rows: temperature <= 0, or top_k == 1: the largest logit, lowest index on ties.
    2. Scores ``l = (x - max(x)) / temperature``.
    3. 0 < top_k < W: keep l >= the k-th largest; ties with it stay.
    4. top_p < 1: with p the softmax of what is kept, keep i if the mass of the candidates with a
       score strictly above l_i is < top_p (so the one that crosses the threshold stays, and the
       largest always does).
    5. min_p > 0: keep ``exp(l_i) >= min_p``, i.e. p_i >= min_p * p_max.
    6. Draw argmax of ``l_i + gumbel_i`` (`gumbel_noise` of the id), lowest index on ties.

    reference=True is the released model's rule: the temperature is ``temperature + 1e-5``, and one
    <= 0 divides by nothing and still draws; top_p drops the crossing candidate: in stable
    descending order keep while the cumulative mass, own mass included, is <= top_p, and always the
    first; min_p is ignored. Step 1 then only holds for top_k == 1.

    Returns ids [R] int64 (first_id + column) and their log-probabilities [R] float32 under the
    softmax of the unmodified row. A row with a NaN or +inf, or with nothing but -inf, gives id -1
    and log-probability NaN.
    """
    return torch.ops.kelix.sample_blocks(logits, params, seeds, steps, slots, first_id, reference)


def _lowest_argmax(rows: Tensor) -> Tensor:
    """Column of the maximum, the lowest one on ties (torch.argmax promises no order)."""
    columns = torch.arange(rows.shape[1], device=rows.device)
    at_max = rows == rows.amax(-1, keepdim=True)
    return torch.where(at_max, columns, rows.shape[1]).amin(-1)


def _keep_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    width = scores.shape[1]
    wanted = top_k.long()
    index = (wanted.clamp(1, width) - 1).unsqueeze(1)
    kth = scores.sort(dim=-1, descending=True).values.gather(1, index)
    off = ((wanted <= 0) | (wanted >= width)).unsqueeze(1)
    return scores.masked_fill((scores < kth) & ~off, -math.inf)


def _keep_top_p(scores: Tensor, top_p: Tensor, reference: bool) -> Tensor:
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(-1).cumsum(-1)
    threshold = top_p.unsqueeze(1)
    if reference:
        dropped = mass > threshold
    else:
        # Mass strictly above: the cumulative mass before the first candidate of equal score.
        before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), dim=-1)
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        dropped = torch.where(starts, before, 0.0).cummax(-1).values >= threshold
        dropped &= ordered != ordered[:, :1]
    dropped[:, 0] = False
    dropped &= threshold < 1.0
    mask = torch.zeros_like(dropped).scatter(1, order, dropped)
    return scores.masked_fill(mask, -math.inf)


def kept_scores(logits: Tensor, params: Tensor, reference: bool = False) -> Tensor:
    """Scores [R, W] float32 after steps 2-5 of `sample_blocks`: -inf where dropped.

    Their softmax is the distribution that a non-greedy row is drawn from.
    """
    temperature, top_k, top_p, min_p = params.float().unbind(-1)
    if reference:
        divisor = torch.where(temperature > 0, temperature + 1e-5, 1.0)
    else:
        divisor = torch.where(temperature > 0, temperature, 1.0)
    values = wide(logits)
    scores = (values - values.amax(-1, keepdim=True)) / divisor.unsqueeze(1)
    scores = _keep_top_k(scores, top_k)
    scores = _keep_top_p(scores, top_p, reference)
    if reference:
        return scores
    too_small = (scores.exp() < min_p.unsqueeze(1)) & (min_p > 0).unsqueeze(1)
    return scores.masked_fill(too_small & (scores < 0), -math.inf)


def sample_blocks_ref(
    logits: Tensor,
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    slots: Tensor,
    first_id: int = 0,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain-torch `sample_blocks`."""
    values = wide(logits)
    valid = values.amax(-1).isfinite()  # amax propagates NaN
    values = torch.where(valid.unsqueeze(1), values, 0.0)
    ids = first_id + torch.arange(values.shape[1], device=values.device)
    noise = gumbel_noise(
        ids.unsqueeze(0), seeds.unsqueeze(1), steps.unsqueeze(1), slots.unsqueeze(1)
    )
    drawn = _lowest_argmax(kept_scores(values, params, reference) + noise)
    greedy = params[:, 1] == 1
    if not reference:
        greedy |= params[:, 0] <= 0
    column = torch.where(greedy, _lowest_argmax(values), drawn)
    logprobs = values.log_softmax(-1).gather(1, column.unsqueeze(1)).squeeze(1).float()
    return (
        torch.where(valid, column + first_id, -1),
        torch.where(valid, logprobs, math.nan),
    )


@register_fake("sample_blocks")
def _sample_blocks_fake(
    logits: Tensor,
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    slots: Tensor,
    first_id: int = 0,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
    )
