"""block_decode against plain torch: shapes, dtypes, sampling rules, ends of blocks, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from kelix_rt.ops.block_decoder import BlockDecoderShape, pack_block_decoder
from kelix_rt.quantization import quantize_int8
from tests.ops.helpers import DEVICES, DTYPES, opcheck, randn

GREEDY = (0.0, 0.0, 1.0, 0.0)
SAMPLED = [(1.0, 0.0, 1.0, 0.0), (0.7, 10.0, 0.9, 0.0), (1.3, 0.0, 0.8, 0.02)]
BLOCK_END = 5


@dataclass(frozen=True)
class Case:
    """Sizes of one model, and what its rows tend to draw at slot 0."""

    num_codes: int = 4
    layers: int = 1
    d_model: int = 24
    heads: int = 4
    ffn: int = 40
    wide: int = 32
    text_vocab: int = 50
    codes: int = 16
    batch: int = 3
    text_scale: float = 1.0  # near 0, visual ids win slot 0
    banned: int = 9
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    int8_head: bool = False

    @property
    def shape(self) -> BlockDecoderShape:
        return BlockDecoderShape(
            self.d_model, self.heads, self.layers, self.ffn, self.wide, self.num_codes + 1
        )

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        state = {}
        for index, (name, size) in enumerate(self.shape.tensors()):
            if name.endswith("norm.weight"):
                value = 1 + randn(*size, seed=seed + index, scale=0.2)
            elif name.endswith("bias") or name.startswith("position"):
                value = randn(*size, seed=seed + index, scale=0.3)
            else:
                value = randn(*size, seed=seed + index, scale=size[-1] ** -0.5)
            state[name] = value.to(self.device, self.dtype)
        vocab = self.text_vocab + self.num_codes * self.codes
        head = randn(vocab, self.wide, seed=seed + 101, scale=3 * self.wide**-0.5)
        head[: self.text_vocab] *= self.text_scale
        float_tensors = {
            "hidden": randn(self.batch, self.wide, seed=seed + 100),
            "table": randn(vocab, self.wide, seed=seed + 102),
            "head_norm": 1 + randn(self.wide, seed=seed + 103, scale=0.1),
            "head": head,
        }
        tensors = {k: v.to(self.device, self.dtype) for k, v in float_tensors.items()}
        if self.int8_head:
            tensors["head"], tensors["head_scale"] = quantize_int8(tensors["head"])
        return tensors | {"weights": pack_block_decoder(state)}

    def arguments(self, rule: tuple[float, ...], seed: int = 0) -> dict[str, Any]:
        keys = torch.arange(self.batch, device=self.device)
        params = torch.tensor(rule, device=self.device)
        return self.tensors(seed) | {
            "params": params.expand(self.batch, self.num_codes + 1, 4),
            "seeds": keys * 977 + seed,
            "steps": keys + 2**33,
            "num_codes": self.num_codes,
            "text_vocab": self.text_vocab,
            "block_end": BLOCK_END,
            "banned_id": self.banned,
            "d_model": self.d_model,
            "num_heads": self.heads,
            "num_layers": self.layers,
            "ffn": self.ffn,
            "norm_eps": 1e-5,
        }


VISUAL = Case(text_scale=0.01)
MIXED = Case(num_codes=8, batch=5, text_scale=0.4, heads=2)
# Slot 0 is wide enough that several CTAs share a row.
WIDE = Case(
    num_codes=2, d_model=16, heads=2, ffn=16, wide=8, text_vocab=16500, codes=8, batch=2,
    text_scale=0.3,
)  # fmt: skip
CASES = [
    VISUAL,
    Case(),
    Case(num_codes=1, batch=1, text_scale=0.01),
    MIXED,
    Case(num_codes=3, layers=2, d_model=15, heads=3, ffn=7, wide=37, text_scale=0.3, batch=4),
    Case(num_codes=8, layers=2, d_model=33, heads=1, ffn=20, wide=65, text_scale=0.01, batch=2),
    Case(num_codes=2, d_model=32, heads=8, wide=24, text_vocab=333, codes=70, batch=9),
    Case(num_codes=2, d_model=1, heads=1, ffn=1, wide=1, text_vocab=6, codes=1, batch=2, banned=3),
    WIDE,
]


def assert_equal_to_torch(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ids, logprobs = ops.block_decode(**arguments)
    wanted, wanted_logprobs = ops.block_decode_ref(**arguments)
    assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert torch.equal(ids, wanted), f"{ids.tolist()} instead of {wanted.tolist()}"
    torch.testing.assert_close(logprobs, wanted_logprobs, rtol=1e-5, atol=2e-5, equal_nan=True)
    return ids, logprobs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [GREEDY, *SAMPLED])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"N{case.num_codes}d{case.d_model}")
def test_equals_torch(case: Case, rule: tuple[float, ...], dtype: torch.dtype, device: str) -> None:
    case = replace(case, dtype=dtype, device=device)
    for seed in range(3):
        assert_equal_to_torch(case.arguments(rule, seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [GREEDY, SAMPLED[1]])
@pytest.mark.parametrize(
    "case", [*CASES, replace(MIXED, wide=512)], ids=lambda c: f"N{c.num_codes}D{c.wide}"
)
def test_int8_head_equals_torch(
    case: Case, rule: tuple[float, ...], dtype: torch.dtype, device: str
) -> None:
    case = replace(case, dtype=dtype, device=device, int8_head=True)
    for seed in range(2):
        arguments = case.arguments(rule, seed)
        assert_equal_to_torch(arguments)


def moved_by_rounding(arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """Models and states in float64, each value moved by about 8 rounding steps of float32."""
    return {
        name: value.double() * (1 + 2.0**-20 * randn(*value.shape, seed=seed).double())
        if name in ("hidden", "weights", "table", "head_norm", "head")
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8_head", [False, True])
@pytest.mark.parametrize("case", [*CASES, replace(MIXED, wide=512)])
def test_no_id_compared_above_hangs_on_rounding(
    case: Case, int8_head: bool, dtype: torch.dtype
) -> None:
    """Else a machine that adds in another order would fail for nothing."""
    case = replace(case, dtype=dtype, int8_head=int8_head)
    for rule in [GREEDY, *SAMPLED]:
        for seed in range(3):
            arguments = case.arguments(rule, seed)
            ids, _ = ops.block_decode_ref(**arguments)
            for other in range(3):
                moved = moved_by_rounding(arguments, seed=500 + other)
                assert torch.equal(ops.block_decode_ref(**moved)[0], ids), (rule, seed)


@pytest.mark.parametrize("device", DEVICES)
def test_both_kinds_of_block_appear(device: str) -> None:
    """The cases above mean something: text rows, visual rows, and batches that hold both."""
    case = replace(MIXED, device=device, batch=40)
    ids, logprobs = assert_equal_to_torch(case.arguments(SAMPLED[0]))
    visual = ids[:, 0] >= case.text_vocab
    assert 5 <= visual.sum() <= 35
    assert (ids[~visual, 1:] == BLOCK_END).all() and (logprobs[~visual, 1:] == 0).all()
    assert (ids[:, -1] == BLOCK_END).all() and (logprobs[:, -1] == 0).all()
    codes = ids[visual, : case.num_codes] - case.text_vocab
    assert torch.equal(codes // case.codes, torch.arange(8, device=device).expand_as(codes))
    assert (logprobs[visual, : case.num_codes] < 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [GREEDY, SAMPLED[1]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_is_independent_of_its_batch(
    dtype: torch.dtype, rule: tuple[float, ...], device: str
) -> None:
    """Bit-equal alone and in a batch of 13, among rows that leave early."""
    case = replace(MIXED, batch=13, wide=70, dtype=dtype, device=device)
    arguments = case.arguments(rule)
    ids, logprobs = ops.block_decode(**arguments)
    for row in range(case.batch):
        alone = {
            name: value[row : row + 1] if name in ("hidden", "params", "seeds", "steps") else value
            for name, value in arguments.items()
        }
        one_ids, one_logprobs = ops.block_decode(**alone)
        assert torch.equal(one_ids[0], ids[row])
        assert torch.equal(one_logprobs[0], logprobs[row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        MIXED,
        CASES[4],
        replace(WIDE, text_vocab=16501),
        replace(WIDE, text_vocab=16501, int8_head=True, wide=48),
        replace(WIDE, text_vocab=16501, wide=9),
    ],
    ids=lambda case: f"d{case.d_model}D{case.wide}{'int8' * case.int8_head}",
)
def test_a_large_batch_and_its_parts_agree(case: Case, dtype: torch.dtype, device: str) -> None:
    """Bit-equal in the CUDA kernels' two forms: a launch per step for a batch of nine, one launch
    for its first rows, some of which leave early."""
    case = replace(case, batch=9, dtype=dtype, device=device)
    arguments = case.arguments(SAMPLED[1])
    arguments["params"] = arguments["params"].clone()
    arguments["params"][::2, 1:] = torch.tensor(SAMPLED[0], device=device)
    ids, logprobs = ops.block_decode(**arguments)
    for rows in (1, 3, 8):
        first = {
            name: value[:rows] if name in ("hidden", "params", "seeds", "steps") else value
            for name, value in arguments.items()
        }
        some_ids, some_logprobs = ops.block_decode(**first)
        assert torch.equal(some_ids, ids[:rows]) and torch.equal(some_logprobs, logprobs[:rows])


def test_independent_of_the_number_of_threads() -> None:
    case = replace(MIXED, wide=512, d_model=128, ffn=300, text_vocab=2000, codes=400)
    arguments = case.arguments(SAMPLED[0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ids, logprobs = ops.block_decode(**arguments)
        torch.set_num_threads(3)
        more_ids, more_logprobs = ops.block_decode(**arguments)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ids, more_ids) and torch.equal(logprobs, more_logprobs)


@pytest.mark.parametrize("device", DEVICES)
def test_params_belong_to_their_slot(device: str) -> None:
    """A greedy slot among drawn ones, and the other way round."""
    case = replace(VISUAL, batch=6, device=device)
    arguments = case.arguments(SAMPLED[0])
    params = arguments["params"].clone()
    params[::2, 1] = torch.tensor(GREEDY, device=device)
    params[1::2, 2] = torch.tensor((0.3, 4.0, 0.7, 0.1), device=device)
    assert_equal_to_torch(arguments | {"params": params})


def raise_head_row(arguments: dict[str, Any], row: int) -> None:
    """Makes `row` of the head the best by far for a batch of one.

    With a large backbone state the residual is all that counts, so its direction is known.
    """
    hidden = arguments["hidden"] * 1000
    head = arguments["head"] * 0.01
    head[row] = 4 * hidden[0].sign()
    arguments |= {"hidden": hidden, "head": head}


@pytest.mark.parametrize("device", DEVICES)
def test_block_end_as_first_id(device: str) -> None:
    arguments = replace(Case(), batch=1, device=device).arguments(GREEDY)
    raise_head_row(arguments, BLOCK_END)
    ids, logprobs = assert_equal_to_torch(arguments)
    assert (ids == BLOCK_END).all()
    assert (logprobs[0, 1:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [GREEDY, (0.1, 0.0, 1.0, 0.0)])
def test_banned_id_is_never_drawn(rule: tuple[float, ...], device: str) -> None:
    arguments = replace(Case(), batch=1, device=device).arguments(rule)
    raise_head_row(arguments, 9)
    banned, _ = assert_equal_to_torch(arguments | {"banned_id": 9})
    allowed, _ = assert_equal_to_torch(arguments | {"banned_id": -1})
    assert banned[0, 0] != 9 and allowed[0, 0] == 9


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_are_not_finite(device: str) -> None:
    """NaN from the start, NaN after two slots, and a healthy row between them."""
    case = replace(VISUAL, batch=4, device=device)
    arguments = case.arguments(SAMPLED[0])
    ids, _ = ops.block_decode(**arguments)
    arguments["hidden"] = arguments["hidden"].clone()
    arguments["hidden"][1] = math.nan
    arguments["table"] = arguments["table"].clone()
    arguments["table"][ids[2, 1]] = math.inf
    got, logprobs = assert_equal_to_torch(arguments)
    assert (got[1] == -1).all() and logprobs[1].isnan().all()
    assert torch.equal(got[2, :2], ids[2, :2])
    assert (got[2, 2:] == -1).all() and logprobs[2, 2:].isnan().all()
    assert torch.equal(got[0], ids[0])


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch_and_strided_inputs(device: str) -> None:
    ids, logprobs = ops.block_decode(**replace(VISUAL, batch=0, device=device).arguments(GREEDY))
    assert ids.shape == logprobs.shape == (0, 5)
    arguments = replace(VISUAL, device=device).arguments(SAMPLED[1])
    wanted, _ = ops.block_decode(**arguments)
    strided: dict[str, Any] = {
        name: value.T.contiguous().T
        if name in ("hidden", "table", "head")
        else torch.stack((value, value), dim=-1)[..., 0]
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    assert not strided["head"].is_contiguous() and not strided["weights"].is_contiguous()
    assert torch.equal(ops.block_decode(**strided)[0], wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": randn(3, 33)}, r"table must have shape \[VT, D=33\], got \[114, 32\]"),
        ({"hidden": randn(3, 32).double()}, "hidden must be float32, bfloat16 or float16"),
        ({"head": randn(115, 32)}, r"head must have shape \[VT=114, D=32\], got \[115, 32\]"),
        ({"head_norm": randn(31)}, r"head_norm must have shape \[D=32\], got \[31\]"),
        ({"head_norm": randn(32).half()}, "head_norm must be float32 like hidden, got float16"),
        ({"weights": randn(99)}, r"weights must have shape \[packed=\d+\], got \[99\]"),
        ({"d_model": 20}, r"weights must have shape \[packed=\d+\], got"),
        ({"num_heads": 5}, "num_heads must divide d_model=24, got 5"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"ffn": 0}, "ffn must be at least 1, got 0"),
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"num_codes": 3}, r"head must have text_vocab \+ num_codes \* K = 50 \+ 3 \* K rows"),
        ({"text_vocab": 114}, r"text_vocab must be in \[1, VT=114\), got 114"),
        ({"block_end": 50}, r"block_end must be a text id in \[0, text_vocab=50\), got 50"),
        ({"banned_id": 50}, "banned_id must be -1 .none. or a text id below text_vocab=50, got 50"),
        ({"banned_id": -2}, "banned_id must be -1 .none. or a text id below"),
        ({"params": randn(3, 4, 4)}, r"params must have shape \[B=3, N\+1=5, 4\], got \[3, 4, 4\]"),
        ({"seeds": torch.zeros(2).long()}, r"seeds must have shape \[B=3\], got \[2\]"),
        ({"steps": torch.zeros(3)}, "steps must be int64, got float32"),
        ({"head_scale": torch.ones(114)}, "head must be int8, got float32"),
        ({"head": torch.zeros(114, 32, dtype=torch.int8)}, "head must be float32 like hidden"),
        (
            {"head": torch.zeros(114, 32, dtype=torch.int8), "head_scale": torch.ones(113)},
            r"head_scale must have shape \[VT=114\], got \[113\]",
        ),
        (
            {"head": torch.zeros(114, 32, dtype=torch.int8), "head_scale": torch.ones(114).half()},
            "head_scale must be float32, got float16",
        ),
    ],
)
def test_errors_name_the_rule(change: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"block_decode: {message}"):
        ops.block_decode(**(Case().arguments(GREEDY) | change))


def test_opcheck() -> None:
    op = torch.ops.kelix.block_decode.default
    for case in (VISUAL, replace(VISUAL, int8_head=True)):
        arguments = case.arguments(SAMPLED[1])
        opcheck(op, *(arguments.get(argument.name) for argument in op._schema.arguments))
