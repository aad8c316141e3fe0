"""rope_store_kv and paged_attention with a cache of float8_e4m3fn."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from tests.ops.helpers import DEVICES, DTYPES, assert_as_accurate_as_torch, randn
from tests.ops.test_attention import (
    GROUPS,
    LENGTHS,
    LONG,
    LONG_MIXED,
    REFILLED,
    SHAPES,
    Shape,
    attention_arguments,
    copied,
    plain_attention_in_dtype,
    rope_arguments,
    rounding_steps,
    unaligned,
)

FLOAT8 = torch.float8_e4m3fn
CACHES = ("k_cache", "v_cache")
# Heads that only some forms of the GPU kernels take: 8 bytes a row but not 16, and neither.
ODD_HEADS = [Shape(4, 2, 40, 16), Shape(6, 2, 104, 32), Shape(4, 2, 36, 16), Shape(2, 1, 130, 4)]


def rounded(values: Tensor) -> Tensor:
    """What a float8 cache holds of `values`."""
    return values.clamp(-448, 448).to(FLOAT8)


def same_codes(got: Tensor, want: Tensor) -> bool:
    """Equal bit for bit, where a NaN equals a NaN of either sign."""
    a, b = (tensor.view(torch.uint8).int() for tensor in (got, want))
    return bool(((a == b) | ((a % 128 == 127) & (b % 128 == 127))).all())


def with_float8_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {name: rounded(arguments[name]) for name in CACHES}


def check_attention(arguments: dict[str, Any]) -> None:
    """As exact as torch in the dtype of q on the cache's values, which every dtype can hold."""
    dtype = arguments["q"].dtype
    in_dtype = arguments | {name: arguments[name].to(dtype) for name in CACHES}
    wide = {name: arguments[name].double() for name in ("q", *CACHES)}
    assert_as_accurate_as_torch(
        ops.paged_attention(**arguments),
        plain_attention_in_dtype(**in_dtype),
        ops.paged_attention_ref(**{**arguments, **wide}),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", [*SHAPES, *ODD_HEADS])
def test_paged_attention(
    shape: Shape, lengths: list[tuple[int, int]], dtype: torch.dtype, device: str
) -> None:
    check_attention(with_float8_cache(attention_arguments(shape, lengths, dtype, device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", GROUPS)
def test_head_groups(shape: Shape, device: str) -> None:
    for lengths, dtype in product((LENGTHS[1], LENGTHS[3]), (torch.bfloat16, torch.float16)):
        check_attention(with_float8_cache(attention_arguments(shape, lengths, dtype, device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts(dtype: torch.dtype, device: str) -> None:
    """However a context is split, the result is right, and the same every time."""
    arguments = with_float8_cache(attention_arguments(Shape(8, 2, 64, 16), LONG, dtype, device))
    check_attention(arguments)
    assert torch.equal(ops.paged_attention(**arguments), ops.paged_attention(**arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_contexts_of_prompts_and_replies(dtype: torch.dtype, device: str) -> None:
    arguments = attention_arguments(Shape(8, 2, 72, 32), LONG_MIXED, dtype, device)
    check_attention(with_float8_cache(arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("lengths", REFILLED)
def test_more_keys_than_stages(
    lengths: list[tuple[int, int]], head_dim: int, dtype: torch.dtype, device: str
) -> None:
    arguments = attention_arguments(Shape(8, 8, head_dim, 16), lengths, dtype, device)
    check_attention(with_float8_cache(arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rows"), [*product((64, 8, 6), (1, 4))])
def test_every_code_is_read_exactly(
    head_dim: int, rows: int, dtype: torch.dtype, device: str
) -> None:
    """Attention to one repeated value is that value: all 256 codes, on every path of the GPU."""
    tokens = -(-256 // head_dim)
    codes = (torch.arange(tokens * head_dim) % 256).to(torch.uint8)
    arguments = attention_arguments(
        Shape(1, 1, head_dim, rows), [(rows, rows)] * tokens, dtype, device
    )
    pages = arguments["page_table"][:, 0].long().cpu()
    values = torch.zeros(arguments["v_cache"].shape, dtype=torch.uint8)
    values[pages, 0] = codes.view(tokens, 1, head_dim)
    arguments["v_cache"] = values.to(device).view(FLOAT8)
    arguments["k_cache"] = torch.zeros_like(values, device=device).view(FLOAT8)
    got = ops.paged_attention(**arguments).view(tokens, rows, head_dim)
    want = codes.view(FLOAT8).to(dtype).view(tokens, 1, head_dim).expand_as(got)
    torch.testing.assert_close(got.cpu(), want, atol=0, rtol=1e-6, equal_nan=True)


def many_values(dtype: torch.dtype) -> Tensor:
    """All numbers of 16 bits; of 32 bits random ones, and all that lie around a rounding."""
    if dtype != torch.float32:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    codes = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    halves = torch.cat(((codes[:-1] + codes[1:]) / 2, codes, torch.tensor([464.0, 480.0])))
    near = torch.cat([(halves.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)])
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, ((1 << 15) - 2 * len(near),), generator=generator)
    return torch.cat((near, -near, bits.to(torch.int32).view(torch.float32)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 4])
def test_values_are_rounded_as_torch_does(head_dim: int, dtype: torch.dtype, device: str) -> None:
    values = many_values(dtype)[:: 1 if head_dim == 64 else 5]
    rows = values[: len(values) // head_dim * head_dim].view(-1, 1, head_dim)
    zero = torch.zeros_like(rows)
    cache = (len(rows), 1, 1, head_dim)
    k_cache, v_cache = (torch.zeros(cache, device=device).to(FLOAT8) for _ in CACHES)
    slots = torch.arange(len(rows), device=device)
    ops.rope_store_kv(
        torch.cat((zero, zero, rows), 1).flatten(1).to(device), None, None,
        torch.cat((torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)), 1).to(device),
        torch.zeros(len(rows), dtype=torch.int32, device=device), slots, k_cache, v_cache, 1,
    )  # fmt: skip
    assert same_codes(v_cache.cpu().view(rows.shape), rounded(rows))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_store_kv(shape: Shape, norm: bool, dtype: torch.dtype, device: str) -> None:
    """Queries and unstored rows as with a cache of the dtype; stored rows are that one rounded."""
    mine = rope_arguments(shape, dtype, device, norm)
    mine["qkv"] *= 100  # without a norm some lie beyond 448
    plain = copied(mine)
    mine = with_float8_cache(mine)
    reference = copied(mine)
    q = ops.rope_store_kv(**mine)
    assert torch.equal(q, ops.rope_store_kv(**plain))
    for name in CACHES:
        assert same_codes(mine[name], rounded(plain[name]))
    ops.rope_store_kv_ref(**reference)
    assert same_codes(mine["v_cache"], reference["v_cache"])
    # The norm's two roundings may fall to either side, and now and then take a key along.
    assert rounding_steps(mine["k_cache"], reference["k_cache"]) <= 1
    assert (mine["k_cache"].float() != reference["k_cache"].float()).double().mean() < 0.02


def test_beyond_the_range_is_its_end() -> None:
    arguments = with_float8_cache(rope_arguments(SHAPES[0], torch.float32, "cpu", norm=False))
    arguments["qkv"] = torch.full_like(arguments["qkv"], 1e30)
    arguments["slots"] = torch.arange(len(arguments["slots"]))
    ops.rope_store_kv(**arguments)
    stored = arguments["v_cache"][0, :, : len(arguments["slots"])].float()
    assert torch.equal(stored, torch.full_like(stored, 448))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_and_read(dtype: torch.dtype, device: str) -> None:
    """A prompt stored in a float8 cache answers like one in a cache of its dtype, rounded."""
    shape, tokens = Shape(8, 2, 64, 16), 40
    arguments = attention_arguments(shape, [(tokens, tokens)], dtype, device)
    pages = arguments["page_table"][0].long()
    at = torch.arange(tokens, device=device)
    rope = rope_arguments(shape, dtype, device, norm=True) | {
        "qkv": randn(tokens, 12 * 64, dtype=dtype, device=device, seed=7),
        "positions": at.int(),
        "slots": pages[at // 16] * 16 + at % 16,
        **{name: arguments[name] for name in CACHES},
    }
    float8 = with_float8_cache(rope)
    plain = copied(rope)
    q = ops.rope_store_kv(**float8)
    ops.rope_store_kv(**plain)
    check_attention(arguments | {"q": q} | {name: float8[name] for name in CACHES})
    got = ops.paged_attention(**arguments | {"q": q} | {name: float8[name] for name in CACHES})
    exact = ops.paged_attention(**arguments | {"q": q} | {name: plain[name] for name in CACHES})
    error = (got.double() - exact.double()).norm() / exact.double().norm()
    assert 0 < error < 2**-4  # of the values; those of the keys shift weights by a little


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_pages_do_not_matter(dtype: torch.dtype) -> None:
    """NaN in pages of others, and behind the context in the own last page, is never read."""
    for rows, head_dim in product((1, 2), (16, 72)):
        arguments = with_float8_cache(
            attention_arguments(Shape(4, 2, head_dim, 16), [(21, rows)], dtype, "cpu")
        )
        clean = ops.paged_attention(**arguments)
        mine = arguments["page_table"][0, :2].long()
        for name in CACHES:
            poisoned = torch.full_like(arguments[name], torch.nan)
            poisoned[mine] = arguments[name][mine]
            poisoned[mine[1], :, 5:] = torch.nan
            arguments[name] = poisoned
        assert torch.equal(ops.paged_attention(**arguments), clean)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_tensors(dtype: torch.dtype, device: str) -> None:
    """What cannot be loaded in wide pieces is as right."""
    arguments = with_float8_cache(attention_arguments(SHAPES[0], LENGTHS[1], dtype, device))
    for name in ("q", *CACHES):
        check_attention({**arguments, name: unaligned(arguments[name])})
    rope = with_float8_cache(rope_arguments(SHAPES[0], dtype, device, norm=True))
    want = copied(rope)
    ops.rope_store_kv(**want)
    for name in ("qkv", "cos_sin", *CACHES):
        moved = copied(rope) | {name: unaligned(rope[name])}
        ops.rope_store_kv(**moved)
        for cache in CACHES:
            got, expected = (side[cache].float() for side in (moved, want))
            torch.testing.assert_close(got, expected, atol=2**-8, rtol=2**-3)


def test_errors_name_the_dtypes() -> None:
    attention = attention_arguments(SHAPES[0], [(21, 2)], torch.bfloat16, "cpu")
    rope = rope_arguments(SHAPES[0], torch.bfloat16, "cpu", norm=True)
    for op, arguments, like in (
        (ops.paged_attention, attention, "q"),
        (ops.rope_store_kv, rope, "qkv"),
    ):
        either = f"must be bfloat16 like {like}, or float8_e4m3fn"
        float8 = with_float8_cache(arguments)
        bad = [
            ("v_cache", arguments["v_cache"], "must be float8_e4m3fn like k_cache, got bfloat16"),
            ("k_cache", float8["k_cache"].half(), f"{either}, got float16"),
            ("k_cache", float8["k_cache"].to(torch.float8_e5m2), f"{either}, got Float8_e5m2"),
            (like, arguments[like].to(FLOAT8), "must be float32, bfloat16 or float16, got float8"),
        ]
        for name, tensor, message in bad:
            with pytest.raises(RuntimeError, match=f"{op.__name__}: {name} {message}"):
                op(**float8 | {name: tensor})
        with pytest.raises(RuntimeError, match="v_cache must be bfloat16 like k_cache, got float8"):
            op(**float8 | {"k_cache": arguments["k_cache"]})


def test_opcheck() -> None:
    """Fake kernel and dispatch. The schema, one for all dtypes, is checked with another: torch's
    check of it multiplies the cache, which this torch cannot."""

    def opcheck(op: torch._ops.OpOverload, *args: Any) -> None:
        torch.library.opcheck(op, args, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))

    rope = with_float8_cache(rope_arguments(SHAPES[0], torch.float32, "cpu", norm=True))
    opcheck(torch.ops.kelix.rope_store_kv.default, *rope.values())
    arguments = attention_arguments(SHAPES[0], [(21, 2), (3, 1)], torch.float32, "cpu")
    opcheck(torch.ops.kelix.paged_attention.default, *with_float8_cache(arguments).values())
