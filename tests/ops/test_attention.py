"""rope_store_kv and paged_attention against plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from tests.ops.helpers import DEVICES, DTYPES, assert_as_accurate_as_torch, opcheck, randn


@dataclass(frozen=True)
class Shape:
    """Heads and pages of a case."""

    heads: int
    kv_heads: int
    head_dim: int
    page: int


# On a GPU: float32 and large or odd head_dim take one kernel, bf16 and fp16 those on tensor cores.
SHAPES = [
    Shape(4, 2, 16, 16),
    Shape(4, 1, 24, 4),
    Shape(6, 2, 72, 16),
    Shape(32, 8, 128, 16),
    Shape(40, 1, 64, 64),
    Shape(3, 3, 256, 32),
    Shape(7, 7, 2, 1),
]
GROUPS = [
    Shape(2 * group, 2, head_dim, page)
    for (group, head_dim), page in zip(
        product((1, 4, 5, 8), (64, 72, 128)), cycle((16, 32, 64, 32)), strict=False
    )
]


def rope_table(head_dim: int, length: int = 64) -> Tensor:
    angle = torch.arange(length).double()[:, None] * 10000.0 ** (
        -torch.arange(0, head_dim, 2).double() / head_dim
    )
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def rope_arguments(shape: Shape, dtype: torch.dtype, device: str, norm: bool) -> dict[str, Any]:
    tokens, pages = 11, 8
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    cache = (pages, shape.kv_heads, shape.page, shape.head_dim)
    slots = torch.randperm(pages * shape.page, generator=torch.Generator().manual_seed(3))[:tokens]
    slots = torch.cat((slots, torch.full((tokens,), -1)))[:tokens]  # page size 1: some are skipped
    slots[4] = -1
    return {
        "qkv": randn(tokens, width, dtype=dtype, device=device),
        "q_weight": randn(shape.head_dim, dtype=dtype, device=device, seed=1) if norm else None,
        "k_weight": randn(shape.head_dim, dtype=dtype, device=device, seed=2) if norm else None,
        "cos_sin": rope_table(shape.head_dim).to(device),
        "positions": torch.arange(tokens, dtype=torch.int32).mul(29).remainder(64).to(device),
        "slots": slots.to(device),
        "k_cache": randn(*cache, dtype=dtype, device=device, seed=4),
        "v_cache": randn(*cache, dtype=dtype, device=device, seed=5),
        "num_heads": shape.heads,
        "eps": 1e-6,
    }


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    """A copy whose floating-point tensors are float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in copied(arguments).items()
    }


def rounding_steps(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    """Largest difference in units of the dtype's spacing at `size` (default: want), at least 1."""
    spacing = torch.finfo(got.dtype).eps * (want if size is None else size).double().abs()
    return (
        ((got.double() - want.double()).abs() / spacing.clamp(min=torch.finfo(got.dtype).eps))
        .max()
        .item()
    )


def rotated_size(x: Tensor) -> Tensor:
    """Lengths of the pairs that RoPE turned, at each of their two values: a turn keeps them."""
    return torch.hypot(*x.double().chunk(2, dim=-1)).repeat(*[1] * (x.dim() - 1), 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_store_kv(shape: Shape, norm: bool, dtype: torch.dtype, device: str) -> None:
    mine = rope_arguments(shape, dtype, device, norm)
    theirs, exact = copied(mine), doubled(mine)
    got = mine | {"q": ops.rope_store_kv(**mine)}
    want = theirs | {"q": ops.rope_store_kv_ref(**theirs)}
    truth = exact | {"q": ops.rope_store_kv_ref(**exact)}
    for name in ("q", "k_cache"):
        assert_as_accurate_as_torch(got[name], want[name], truth[name])
        if dtype != torch.float32:
            # It rounds where torch does: the norm's two roundings may fall to either side.
            assert rounding_steps(got[name], want[name], rotated_size(want[name])) <= 2
    assert torch.equal(mine["v_cache"], theirs["v_cache"]), "v is a copy"


def attention_arguments(
    shape: Shape, lengths: list[tuple[int, int]], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """`lengths`: (context, query rows) of each request; pages are handed out in random order."""
    counts = [-(-context // shape.page) for context, _ in lengths]
    pages = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(9)).int()
    table = torch.full((len(lengths), max([*counts, 1]) + 1), -7, dtype=torch.int32)
    used = 0
    for request, count in enumerate(counts):
        table[request, :count] = pages[used : used + count]
        used += count
    rows = [rows for _, rows in lengths]
    cache = (len(pages), shape.kv_heads, shape.page, shape.head_dim)
    return {
        "q": randn(sum(rows), shape.heads, shape.head_dim, dtype=dtype, device=device),
        "k_cache": randn(*cache, dtype=dtype, device=device, seed=1),
        "v_cache": randn(*cache, dtype=dtype, device=device, seed=2),
        "page_table": table.to(device),
        "context_lens": torch.tensor([c for c, _ in lengths], dtype=torch.int32, device=device),
        "query_start": torch.tensor([0, *rows]).cumsum(0).int().to(device),
        "scale": shape.head_dim**-0.5,
    }


LENGTHS = [
    [(1, 1)],
    [(5, 1), (64, 1), (65, 1), (130, 1)],  # decoding
    [(7, 7), (33, 9), (70, 70)],  # prefill, whole and chunked
    [(100, 1), (40, 13), (0, 0), (1, 1)],  # mixed, with an idle request
    [(40, 3), (0, 0), (7, 1), (0, 0)],  # no more rows than requests, but not one each
]
# Contexts that a GPU splits: one key more than a split holds, exactly as many, none at all.
LONG = [(700, 1), (129, 1), (0, 1), (384, 1), (1, 1)]
LONG_MIXED = [(290, 70), (513, 1), (33, 9), (0, 1), (200, 17)]
# More keys in a CTA than the ring of decoding holds (three stages of 64), so that stages are filled
# again: four steps where the page table is too narrow for two splits (240 keys), eight where enough
# rows x KV heads leave two.
REFILLED = [[(224, 1), (193, 1)], [(900, 1), *[(0, 1)] * 65]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_paged_attention(
    shape: Shape, lengths: list[tuple[int, int]], dtype: torch.dtype, device: str
) -> None:
    check_attention(attention_arguments(shape, lengths, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", GROUPS)
def test_head_groups(shape: Shape, device: str) -> None:
    for lengths, dtype in product((LENGTHS[1], LENGTHS[3]), (torch.bfloat16, torch.float16)):
        check_attention(attention_arguments(shape, lengths, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts(dtype: torch.dtype, device: str) -> None:
    """However a context is split, the result is right, and the same every time."""
    arguments = attention_arguments(Shape(8, 2, 64, 16), LONG, dtype, device)
    check_attention(arguments)
    assert torch.equal(ops.paged_attention(**arguments), ops.paged_attention(**arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_contexts_of_prompts_and_replies(dtype: torch.dtype, device: str) -> None:
    check_attention(attention_arguments(Shape(8, 2, 72, 32), LONG_MIXED, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("lengths", REFILLED)
def test_more_keys_than_stages(
    lengths: list[tuple[int, int]], head_dim: int, dtype: torch.dtype, device: str
) -> None:
    check_attention(attention_arguments(Shape(8, 8, head_dim, 16), lengths, dtype, device))


def check_attention(arguments: dict[str, Any], rows: slice = slice(None)) -> None:
    wide = {name: arguments[name].double() for name in ("q", "k_cache", "v_cache")}
    exact = ops.paged_attention_ref(**{**arguments, **wide})
    plain = plain_attention_in_dtype(**arguments)
    got = ops.paged_attention(**arguments)
    assert_as_accurate_as_torch(got[rows], plain[rows], exact[rows])


def plain_attention_in_dtype(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
) -> Tensor:
    """What a torch user would write: gather the pages, scaled_dot_product_attention."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[1]
    for request, context in enumerate(context_lens.tolist()):
        begin, end = query_start[request].item(), query_start[request + 1].item()
        if begin == end or context == 0:
            continue
        pages = page_table[request, : -(-context // k_cache.shape[2])].long()
        k, v = (
            cache[pages].transpose(0, 1).flatten(1, 2)[:, :context].repeat_interleave(group, 0)
            for cache in (k_cache, v_cache)
        )
        seen = torch.ones(end - begin, context, dtype=torch.bool, device=q.device)
        seen = seen.tril(context - (end - begin))
        out[begin:end] = torch.nn.functional.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1), k, v, attn_mask=seen, scale=scale
        ).transpose(0, 1)
    return out


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_keys_are_zero(device: str) -> None:
    arguments = attention_arguments(SHAPES[0], [(4, 1), (0, 1)], torch.float32, device)
    got = ops.paged_attention(**arguments)
    assert got[0].abs().max() > 0
    assert torch.equal(got[1], torch.zeros_like(got[1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scores_of_any_sign(scale: float, device: str) -> None:
    for lengths in ([(70, 1)], [(70, 5)]):
        arguments = attention_arguments(SHAPES[0], lengths, torch.bfloat16, device)
        check_attention({**arguments, "scale": scale})


def test_large_scores_do_not_overflow() -> None:
    arguments = attention_arguments(SHAPES[0], [(90, 3)], torch.float32, "cpu")
    arguments["scale"] = 1e4
    got = ops.paged_attention(**arguments)
    torch.testing.assert_close(got, ops.paged_attention_ref(**arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_pages_do_not_matter(dtype: torch.dtype) -> None:
    """NaN in pages of others, and behind the context in the own last page, is never read."""
    for rows in (1, 2):
        arguments = attention_arguments(Shape(4, 2, 16, 16), [(21, rows)], dtype, "cpu")
        clean = ops.paged_attention(**arguments)
        mine = arguments["page_table"][0, :2].long()
        for name in ("k_cache", "v_cache"):
            poisoned = torch.full_like(arguments[name], torch.nan)
            poisoned[mine] = arguments[name][mine]
            poisoned[mine[1], :, 5:] = torch.nan
            arguments[name] = poisoned
        assert torch.equal(ops.paged_attention(**arguments), clean)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_outside_every_request(device: str) -> None:
    arguments = attention_arguments(SHAPES[0], [(30, 4)], torch.bfloat16, device)
    for begin, end in ((0, 1), (3, 4), (1, 3)):
        arguments["query_start"] = torch.tensor([begin, end], dtype=torch.int32, device=device)
        check_attention(arguments, slice(begin, end))


def unaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that starts one element behind an allocation."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_tensors(dtype: torch.dtype, device: str) -> None:
    """What cannot be loaded in wide pieces is as right."""
    arguments = attention_arguments(SHAPES[0], LENGTHS[1], dtype, device)
    for name in ("q", "k_cache", "v_cache"):
        check_attention({**arguments, name: unaligned(arguments[name])})
    rope = rope_arguments(SHAPES[0], dtype, device, norm=True)
    want, exact = (ops.rope_store_kv_ref(**make(rope)) for make in (copied, doubled))
    for name in ("qkv", "k_weight", "cos_sin", "v_cache"):
        rope[name] = unaligned(rope[name])
        assert_as_accurate_as_torch(ops.rope_store_kv(**rope), want, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_heads(dtype: torch.dtype, device: str) -> None:
    arguments = attention_arguments(SHAPES[0], [(21, 2)], dtype, device)
    none = arguments["q"][:, :0]
    assert ops.paged_attention(**{**arguments, "q": none}).shape == none.shape


def test_errors_name_the_rule() -> None:
    base = attention_arguments(Shape(4, 2, 16, 16), [(21, 2)], torch.float32, "cpu")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"q": randn(2, 5, 16)}, r"q must have a number of heads that KV=2 divides, got \[2, 5"),
        ({"context_lens": torch.tensor([99], dtype=torch.int32)}, "fit its page table of 3 pages"),
        ({"context_lens": torch.tensor([1], dtype=torch.int32)}, "cover the request's 2 rows"),
        (
            {"query_start": torch.tensor([0, 3], dtype=torch.int32)},
            "most T=2, here from 0, got 3",
        ),
        ({"page_table": base["page_table"].long()}, "page_table must be int32, got int64"),
        ({"page_table": torch.full_like(base["page_table"], 99)}, r"must lie in \[0, 5\), got 99"),
        ({"k_cache": base["k_cache"].transpose(1, 2)}, "k_cache must be contiguous|v_cache must"),
    ]
    for change, message in bad:
        with pytest.raises(RuntimeError, match=f"paged_attention: .*{message}"):
            ops.paged_attention(**{**base, **change})
    rope = rope_arguments(SHAPES[0], torch.float32, "cpu", norm=True)
    with pytest.raises(RuntimeError, match=r"rope_store_kv: slots must lie in \[-1, 128\)"):
        ops.rope_store_kv(**{**rope, "slots": rope["slots"] + 1000})
    with pytest.raises(RuntimeError, match=r"rope_store_kv: positions must lie in \[0, 64\)"):
        ops.rope_store_kv(**{**rope, "positions": rope["positions"] + 64})


def test_opcheck() -> None:
    rope = rope_arguments(SHAPES[0], torch.float32, "cpu", norm=True)
    opcheck(torch.ops.kelix.rope_store_kv.default, *rope.values())
    arguments = attention_arguments(SHAPES[0], [(21, 2), (3, 1)], torch.float32, "cpu")
    opcheck(torch.ops.kelix.paged_attention.default, *arguments.values())
