"""sample_blocks against plain torch, against the golden distributions, and against itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt import ops
from kelix_rt.ops.sampling import gumbel_noise, kept_scores, philox4x32
from tests.ops.helpers import DEVICES, DTYPES, opcheck, randn

# temperature, top_k, top_p, min_p
RULES = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 50, 0.9, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 0.5, 0.05),
    (2.0, 5000, 0.99, 0.0),
    (1.0, 3, 1.0, 0.3),
    (1.0, 1.9, 1.0, 0.0),  # a fraction of a candidate is none: 1, but not the greedy rule
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 1.0),
    (0.0, 7, 1.0, 0.0),
    (0.7, 1, 0.5, 0.5),
    (1e-3, 0, 0.999, 1e-6),
]


Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_arguments(rows: int, rule: tuple[float, ...], device: str, seed: int = 0) -> Arguments:
    """params, seeds, steps, slots."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (rows,), generator=generator).to(device)

    params = torch.tensor(rule, dtype=torch.float32, device=device).expand(rows, 4)
    return params, integers(-(2**62), 2**62), integers(0, 2**40), integers(0, 9)


def assert_same_draws(logits: Tensor, arguments: Arguments, first_id: int, reference: bool) -> None:
    """Equal ids wherever the two best scores are not a rounding apart, and 99.9 % overall."""
    ids, logprobs = ops.sample_blocks(logits, *arguments, first_id, reference)
    wanted, wanted_logprobs = ops.sample_blocks_ref(logits, *arguments, first_id, reference)
    params, seeds, steps, slots = arguments
    columns = first_id + torch.arange(logits.shape[1], device=logits.device)
    keys = [key.unsqueeze(1) for key in (seeds, steps, slots)]
    scores = kept_scores(logits, params, reference) + gumbel_noise(columns.unsqueeze(0), *keys)
    best = scores.topk(min(2, logits.shape[1])).values
    clear = best[:, 0] - best[:, -1] > 1e-4 if logits.shape[1] > 1 else params[:, 0] == params[:, 0]
    same = ids == wanted
    assert same[clear].all(), f"rows {(~same & clear).nonzero().flatten().tolist()} differ"
    assert same.float().mean() >= 0.999
    torch.testing.assert_close(logprobs[same], wanted_logprobs[same], rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "rows_and_cols", [(3, 1), (64, 5), (64, 100), (64, 896), (2, 16384), (8, 20001)]
)
def test_draws_what_torch_draws(
    rows_and_cols: tuple[int, int], rule: tuple[float, ...], reference: bool, device: str
) -> None:
    rows, cols = rows_and_cols
    logits = randn(rows, cols, scale=3.0, device=device, seed=cols)
    assert_same_draws(logits, draw_arguments(rows, rule, device), 7, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_ties(rule: tuple[float, ...], reference: bool, dtype: torch.dtype, device: str) -> None:
    """Logits on a coarse grid: the k-th value, the threshold and the maximum are all tied."""
    logits = (randn(64, 300, device=device) * 2).round().to(dtype)
    assert_same_draws(logits, draw_arguments(64, rule, device), 0, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reference", [False, True])
def test_equal_logits_everywhere(reference: bool, device: str) -> None:
    """Every candidate ties with the k-th: all 500 stay, and the draws spread over them."""
    logits = torch.zeros(64, 500, device=device)
    arguments = draw_arguments(64, (1.0, 10, 1.0, 0.0), device)
    assert_same_draws(logits, arguments, 0, reference)
    ids, _ = ops.sample_blocks(logits, *arguments, 0, reference)
    assert ids.unique().numel() > 40
    half = draw_arguments(64, (1.0, 0, 0.5, 0.0), device)
    ids, _ = ops.sample_blocks(logits, *half, 0, reference)
    assert (ids.max() < 250) == reference, "only the released rule splits a tie, in column order"


def chi_square(ids: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; candidates expected less than 5 times share one cell."""
    counts = torch.bincount(ids, minlength=probabilities.numel()).double()
    expected = probabilities.double() * ids.numel()
    common = expected >= 5
    pooled_counts = torch.cat((counts[common], counts[~common].sum().view(1)))
    pooled = torch.cat((expected[common], expected[~common].sum().view(1)))
    used = pooled > 0
    assert pooled_counts[~used].sum() == 0, "a candidate of probability 0 was drawn"
    statistic = ((pooled_counts[used] - pooled[used]).square() / pooled[used]).sum()
    return statistic.item(), int(used.sum()) - 1


def assert_distribution(ids: Tensor, probabilities: Tensor) -> None:
    assert (probabilities[ids] > 0).all(), "a dropped candidate was drawn"
    statistic, freedom = chi_square(ids, probabilities)
    # Mean + 4.5 standard deviations; the seeds are fixed.
    assert statistic <= freedom + 4.5 * math.sqrt(2 * freedom) + 1e-6, (statistic, freedom)


GOLDEN_RULES = [(0.7, 50, 0.9, 0.0), (1.3, 0, 0.8, 0.0)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("model", "case"), [("tiny_a", 0), ("tiny_a", 1), ("tiny_b", 0)])
def test_golden_distribution(
    golden: Path, model: str, case: int, reference: bool, device: str
) -> None:
    """Draws follow the released model's probabilities, or the kept scores' softmax."""
    fixtures = load_file(golden / "llm" / model / "fixtures.safetensors")
    logits = fixtures[f"sample/{case}/logits"].to(device)
    rule = GOLDEN_RULES[case]
    draws = 8000
    for row in range(logits.shape[0]):
        arguments = draw_arguments(draws, rule, device, seed=row)
        rows = logits[row].expand(draws, -1)
        ids, _ = ops.sample_blocks(rows, *arguments, 0, reference)
        if reference:
            wanted = fixtures[f"sample/{case}/probs"][row]
        else:
            params = torch.tensor([rule])
            wanted = kept_scores(logits[row : row + 1].cpu(), params).softmax(-1)[0]
        assert_distribution(ids.cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_flat_distribution(device: str) -> None:
    """No rule and a flat row: what the shortcut in front of the logarithms must not bend."""
    logits = randn(1, 200, scale=0.5, device=device)
    arguments = draw_arguments(40000, (1.0, 0, 1.0, 0.0), device)
    ids, _ = ops.sample_blocks(logits.expand(40000, -1), *arguments)
    assert_distribution(ids.cpu(), logits[0].cpu().softmax(-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[2]])
def test_draw_depends_on_nothing_but_its_keys(rule: tuple[float, ...], device: str) -> None:
    """Not on the batch, the row, or the slice of the head the logits are a part of."""
    logits = randn(9, 1000, device=device)
    arguments = draw_arguments(9, rule, device)
    ids, logprobs = ops.sample_blocks(logits, *arguments, 5)
    for row in range(9):
        params, seeds, steps, slots = (argument[row : row + 1] for argument in arguments)
        one_id, one_logprob = ops.sample_blocks(
            logits[row : row + 1], params, seeds, steps, slots, 5
        )
        assert torch.equal(one_id, ids[row : row + 1])
        assert torch.equal(one_logprob, logprobs[row : row + 1])
    part = logits[:, 300:450]
    masked = torch.full_like(logits, -math.inf)
    masked[:, 300:450] = part
    assert torch.equal(
        ops.sample_blocks(part, *arguments, 305)[0], ops.sample_blocks(masked, *arguments, 5)[0]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_every_key_changes_the_draw(device: str) -> None:
    logits = torch.zeros(64, 1000, device=device)
    params, seeds, steps, slots = draw_arguments(64, (1.0, 0, 1.0, 0.0), device)
    ids, _ = ops.sample_blocks(logits, params, seeds, steps, slots)
    for changed in (
        (seeds + 1, steps, slots),
        (seeds + 2**32, steps, slots),
        (seeds, steps + 1, slots),
        (seeds, steps + 2**32, slots),
        (seeds, steps, slots + 1),
    ):
        assert (ops.sample_blocks(logits, params, *changed)[0] == ids).float().mean() < 0.1
    assert (ops.sample_blocks(logits, params, seeds, steps, slots, 1)[0] == ids + 1).sum() < 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[2], RULES[9]])
def test_rows_that_cannot_be_drawn(
    rule: tuple[float, ...], dtype: torch.dtype, device: str
) -> None:
    logits = randn(6, 130, dtype=dtype, device=device)
    logits[0, 129] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3] = -math.inf
    logits[3, 77] = -5.0
    logits[4, :129] = -math.inf
    ids, logprobs = ops.sample_blocks(logits, *draw_arguments(6, rule, device), 10)
    assert ids[:3].tolist() == [-1, -1, -1] and logprobs[:3].isnan().all()
    assert ids[3].item() == 87 and logprobs[3].item() == 0.0
    assert ids[4].item() == 139
    assert 10 <= ids[5].item() < 140 and logprobs[5].isfinite()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[2], RULES[9]])
def test_wide_rows_that_cannot_be_drawn(rule: tuple[float, ...], device: str) -> None:
    """Rows that several CTAs share, whose parts may hold nothing but -inf."""
    width = 16500
    logits = randn(6, width, device=device)
    logits[0, width - 1] = math.nan
    logits[1, 3] = math.inf
    logits[2:5] = -math.inf
    logits[3, 9000] = -5.0
    logits[4, width - 1] = 700.0
    ids, logprobs = ops.sample_blocks(logits, *draw_arguments(6, rule, device), 10)
    assert ids[:3].tolist() == [-1, -1, -1] and logprobs[:3].isnan().all()
    assert ids[3:5].tolist() == [9010, width + 9] and (logprobs[3:5] == 0).all()
    assert 10 <= ids[5].item() < width + 10 and logprobs[5].isfinite()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [500, 20000])
@pytest.mark.parametrize("rule", [(1.0, 0, -0.5, 0.0), (math.inf, 0, 0.5, 0.0)])
def test_a_filter_out_of_its_range_keeps_the_largest(
    rule: tuple[float, ...], width: int, device: str
) -> None:
    """No draw may come from outside of the row."""
    logits = torch.zeros(3, width, device=device)
    logits[:, width - 1] = 1e-6
    logits[2, 7] = -math.inf
    ids, logprobs = ops.sample_blocks(logits, *draw_arguments(3, rule, device))
    assert ((ids >= 0) & (ids < width)).all() and logprobs.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [500, 20000])
def test_greedy_takes_the_lowest_of_equal_maxima(width: int, device: str) -> None:
    logits = randn(2, width, device=device)
    logits[:, [77, 300, width - 1]] = 9.0
    params = torch.tensor([[0.0, 0, 1, 0], [0.9, 1, 0.5, 0]], device=device)
    zero = torch.zeros(2, dtype=torch.int64, device=device)
    assert ops.sample_blocks(logits, params, zero, zero, zero)[0].tolist() == [77, 77]


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_strided(device: str) -> None:
    rule = (1.0, 0, 0.9, 0.0)
    ids, logprobs = ops.sample_blocks(randn(0, 10, device=device), *draw_arguments(0, rule, device))
    assert ids.shape == (0,) and ids.dtype == torch.int64 and logprobs.dtype == torch.float32
    logits = randn(30, 8, device=device).T
    arguments = draw_arguments(8, rule, device)
    assert torch.equal(
        ops.sample_blocks(logits, *arguments)[0],
        ops.sample_blocks(logits.contiguous(), *arguments)[0],
    )


def test_philox_known_answers() -> None:
    """Random123's test vectors; the native source asserts the same ones when it is compiled."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, wanted in cases:
        words = philox4x32(
            tuple(torch.tensor(word) for word in counter),  # type: ignore[arg-type]
            tuple(torch.tensor(word) for word in key),  # type: ignore[arg-type]
        )
        assert tuple(word.item() for word in words) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": randn(4)}, r"sample_blocks: logits must have shape \[R, W\], got \[4\]"),
        (
            {"params": randn(2, 3)},
            r"sample_blocks: params must have shape \[R=2, 4\], got \[2, 3\]",
        ),
        (
            {"seeds": torch.zeros(2, dtype=torch.int32)},
            "sample_blocks: seeds must be int64, got int32",
        ),
        (
            {"steps": torch.zeros(3, dtype=torch.int64)},
            r"sample_blocks: steps must have shape \[R=2\], got \[3\]",
        ),
        (
            {"logits": randn(2, 0)},
            r"sample_blocks: logits must have at least one column, got \[2, 0\]",
        ),
        ({"first_id": -1}, "sample_blocks: first_id must be >= 0"),
        ({"first_id": 2**63 - 3}, "sample_blocks: first_id must be >= 0, and first_id"),
    ],
)
def test_errors_name_the_rule(change: dict[str, object], message: str) -> None:
    params, seeds, steps, slots = draw_arguments(2, RULES[0], "cpu")
    arguments = {
        "logits": randn(2, 10), "params": params, "seeds": seeds, "steps": steps, "slots": slots,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops.sample_blocks(**(arguments | change))  # type: ignore[arg-type]


def test_opcheck() -> None:
    arguments = draw_arguments(3, RULES[1], "cpu")
    opcheck(torch.ops.kelix.sample_blocks.default, randn(3, 64), *arguments, 4, False)
