"""nearest_codes and block_embed against plain torch and the golden codes of the release."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt import ops
from tests.ops.helpers import DEVICES, DTYPES, assert_as_accurate_as_torch, opcheck, randn

# (tokens, books, codes, dim): tiles of every path are cut, odd and empty. The last five are for
# tensor cores: one tile, cut tiles of tokens and codes, codes split over CTAs, padded columns.
SHAPES = [(1, 1, 1, 1), (5, 3, 37, 7), (97, 2, 33, 20), (0, 2, 8, 4), (33, 8, 512, 128),
          (130, 1, 129, 64), (1, 2, 5, 128), (137, 1, 200, 128), (9, 1, 700, 72)]  # fmt: skip


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, books, codes, dim = shape
    z = randn(tokens, books, dim, dtype=dtype, device=device) + 0.5
    codebooks = randn(books, codes, dim, dtype=dtype, device=device, seed=1)
    weight = 1 + randn(books, dim, dtype=dtype, device=device, seed=2, scale=0.1)
    bias = randn(books, dim, dtype=dtype, device=device, seed=3, scale=0.1)
    return z, codebooks, weight, bias


def assert_nearest(got: Tensor, z: Tensor, codebooks: Tensor) -> None:
    """Each chosen code is the nearest up to float32's error of a distance."""
    wide, codes = z.double().cpu(), codebooks.double().cpu()
    distance = torch.cdist(wide.transpose(0, 1), codes).square().transpose(0, 1)
    assert got.dtype == torch.int64
    assert got.shape == z.shape[:2]
    assert got.numel() == 0 or (got.min() >= 0 and got.max() < codebooks.shape[1])
    chosen = distance.gather(-1, got.cpu().unsqueeze(-1)).squeeze(-1)
    assert ((chosen - distance.amin(-1)) <= 1e-5 * (1 + distance.amax(-1))).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    z, codebooks, _, _ = inputs(shape, dtype, device)
    got = ops.nearest_codes(z, codebooks, ops.codebook_norms(codebooks))
    assert_nearest(got, z, codebooks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] > 1])
def test_layer_norm_comes_first(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    z, codebooks, weight, bias = inputs(shape, dtype, device)
    got = ops.nearest_codes(z, codebooks, ops.codebook_norms(codebooks), weight, bias)
    books = range(z.shape[1])
    normed = torch.stack([ops.layer_norm_ref(z[:, i], weight[i], bias[i]) for i in books], dim=1)
    if dtype == torch.float32:
        assert_nearest(got, normed, codebooks)
    else:  # a value of the norm may fall on the other side of a rounding
        plain = ops.nearest_codes(normed, codebooks, ops.codebook_norms(codebooks))
        assert (got != plain).sum() <= 0.01 * got.numel()


def test_eps_of_the_norm_matters() -> None:
    z = randn(64, 1, 16, scale=1e-3)
    codebooks = randn(1, 512, 16, seed=1, scale=0.5)
    norms = ops.codebook_norms(codebooks)
    one, zero = torch.ones(1, 16), torch.zeros(1, 16)
    near = ops.nearest_codes(z, codebooks, norms, one, zero, 1e-8)
    far = ops.nearest_codes(z, codebooks, norms, one, zero, 1e-5)
    assert (near != far).float().mean() > 0.2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("data", ["random", "clustered"])
def test_codes_of_the_release(data: str, device: str, golden: Path) -> None:
    """bfloat16 with the release's roundings: equal to the last tie."""
    tensors = load_file(golden / "tokenizer/ops/ops.safetensors", device=device)
    z = tensors[f"vq.{data}.z_norm"].unsqueeze(1)
    codebook = tensors[f"vq.{data}.codebook"].unsqueeze(0)
    rounded = ops.codebook_norms(codebook, reference=True)
    assert torch.equal(rounded[0], tensors[f"vq.{data}.code_sqnorm_bf16"].float())
    got = ops.nearest_codes(z, codebook, rounded, reference=True)
    same = got[:, 0] == tensors[f"vq.{data}.indices_bf16_ref"]
    assert same.float().mean() >= (1.0 if device == "cpu" else 0.99)
    exact = ops.nearest_codes(z, codebook, ops.codebook_norms(codebook))
    assert torch.equal(exact[:, 0], tensors[f"vq.{data}.indices_exact"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_roundings(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    """Small integers are exact in every dtype and sum order, so the roundings must agree."""
    tokens, books, codes, dim = shape
    generator = torch.Generator().manual_seed(4)
    z = torch.randint(-3, 4, (tokens, books, dim), generator=generator).to(device, dtype)
    codebooks = torch.randint(-3, 4, (books, codes, dim), generator=generator).to(device, dtype)
    norms = ops.codebook_norms(codebooks, reference=True)
    got = ops.nearest_codes(z, codebooks, norms, reference=True)
    assert torch.equal(got, ops.nearest_codes_ref(z, codebooks, norms, reference=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reference", [False, True])
def test_lowest_index_wins_ties(reference: bool, device: str) -> None:
    pattern = randn(1, 8, 16, device=device)
    codebooks = pattern.repeat(1, 30, 1)  # every code thirty times
    z = pattern[:, torch.tensor([7, 0, 3]).repeat(40)].transpose(0, 1)
    norms = ops.codebook_norms(codebooks, reference)
    got = ops.nearest_codes(z, codebooks, norms, reference=reference)
    assert got[:, 0].tolist() == [7, 0, 3] * 40


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_ties_across_ctas(dim: int, reference: bool, dtype: torch.dtype, device: str) -> None:
    """Equal codes lie in one thread's columns, in other lanes' and in other CTAs' parts."""
    pattern = randn(1, 37, dim, dtype=dtype, device=device)
    codebooks = torch.cat([-pattern, *[pattern] * 20], dim=1)  # the first 37 are far from all
    chosen = torch.tensor([36, 0, 17, 5, 9]).repeat(27)
    z = pattern[:, chosen].transpose(0, 1)
    norms = ops.codebook_norms(codebooks, reference)
    got = ops.nearest_codes(z, codebooks, norms, reference=reference)
    assert torch.equal(got[:, 0].cpu(), 37 + chosen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", [False, True])
def test_every_code_is_found(reference: bool, dtype: torch.dtype, device: str) -> None:
    """Token t is code t: each column of a tile and each part of the codes must be right."""
    codebooks = randn(1, 421, 128, dtype=dtype, device=device)
    norms = ops.codebook_norms(codebooks, reference)
    got = ops.nearest_codes(codebooks.transpose(0, 1), codebooks, norms, reference=reference)
    assert got[:, 0].tolist() == list(range(421))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [24, 72])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference", [False, True])
def test_more_tiles_than_stages(reference: bool, dtype: torch.dtype, dim: int, device: str) -> None:
    """Every CTA takes more tiles of codes than its ring has stages, so stages are filled again.

    A book is split into 32 parts at most, however large the device: of 130 tiles of 128 codes a CTA
    takes five or more, where the ring of wgmma has four stages, and of 260 tiles of 64 eight or
    more, where that of mma.sync has three. The tokens are codes of tiles all over the book.
    """
    codebooks = randn(1, 16_600, dim, dtype=dtype, device=device)
    chosen = 237 * torch.arange(70, device=device)
    norms = ops.codebook_norms(codebooks, reference)
    got = ops.nearest_codes(
        codebooks[:, chosen].transpose(0, 1), codebooks, norms, reference=reference
    )
    assert torch.equal(got[:, 0], chosen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", [False, True])
def test_nan_row_gives_zero_and_harms_no_other(
    reference: bool, dtype: torch.dtype, device: str
) -> None:
    z, codebooks, weight, bias = inputs((20, 2, 50, 16), dtype, device)
    norms = ops.codebook_norms(codebooks, reference)
    clean = ops.nearest_codes(z, codebooks, norms, weight, bias, reference=reference)
    z[3, 1, 5] = float("nan")
    got = ops.nearest_codes(z, codebooks, norms, weight, bias, reference=reference)
    clean[3, 1] = 0
    assert torch.equal(got, clean)


@pytest.mark.parametrize("device", DEVICES)
def test_codes_do_not_depend_on_the_batch(device: str) -> None:
    z, codebooks, weight, bias = inputs((101, 2, 300, 24), torch.bfloat16, device)
    norms = ops.codebook_norms(codebooks, reference=True)
    whole = ops.nearest_codes(z, codebooks, norms, weight, bias, reference=True)
    for begin, end in [(0, 1), (1, 50), (50, 101)]:
        part = ops.nearest_codes(z[begin:end], codebooks, norms, weight, bias, reference=True)
        assert torch.equal(part, whole[begin:end])


def test_wide_rows_and_many_books() -> None:
    """Scratch per worker grows with d: fewer workers then share the books."""
    z, codebooks, _, _ = inputs((3, 40, 9, 8192), torch.float16, "cpu")
    assert_nearest(ops.nearest_codes(z, codebooks, ops.codebook_norms(codebooks)), z, codebooks)


@pytest.mark.parametrize("device", DEVICES)
def test_data_that_16_byte_accesses_cannot_reach(device: str) -> None:
    shape = (40, 1, 64)
    z = randn(40 * 64 + 1, dtype=torch.bfloat16, device=device)[1:].view(shape)
    codebooks = randn(1, 100, 64, dtype=torch.bfloat16, device=device, seed=1)
    norms = ops.codebook_norms(codebooks)
    assert z.data_ptr() % 16 != 0
    got = ops.nearest_codes(z, codebooks, norms)
    assert_nearest(got, z, codebooks)


def test_non_contiguous_input() -> None:
    z = randn(2, 9, 12).transpose(0, 1)
    codebooks = randn(2, 16, 24, seed=1)[..., ::2]
    norms = ops.codebook_norms(codebooks)
    plain = ops.nearest_codes(z.contiguous(), codebooks.contiguous(), norms.contiguous())
    assert torch.equal(ops.nearest_codes(z, codebooks, norms), plain)


TEXT_VOCAB, BLOCK_END, NUM_CODES = 20, 19, 3
BLOCKS = [
    [21, 25, 30, BLOCK_END],  # visual
    [4, BLOCK_END, BLOCK_END, BLOCK_END],  # text
    [BLOCK_END, BLOCK_END, BLOCK_END, BLOCK_END],  # zero
    [22, BLOCK_END, 30, BLOCK_END],  # cut short
    [4, 25, 26, BLOCK_END],  # text with trailing ids: the first one three times
    [21, 3, 21, 25],  # a text id inside, the last column never counts
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 1000])
def test_block_embed(width: int, dtype: torch.dtype, device: str) -> None:
    table = randn(32, width, dtype=dtype, device=device)
    ids = torch.tensor(BLOCKS, device=device)
    got = ops.block_embed(ids, table, TEXT_VOCAB, BLOCK_END)
    plain = ops.block_embed_ref(ids, table, TEXT_VOCAB, BLOCK_END)
    exact = ops.block_embed_ref(ids, table.double(), TEXT_VOCAB, BLOCK_END)
    assert_as_accurate_as_torch(got, plain, exact)
    assert (got[2] == 0).all()


def test_block_embed_edge_shapes() -> None:
    table = randn(32, 8)
    assert ops.block_embed(torch.empty(0, 4, dtype=torch.int64), table, 20, 19).shape == (0, 8)
    assert ops.block_embed(torch.full((2, 1), 25), table, 20, 19).eq(0).all()
    ids = torch.tensor(BLOCKS).T.contiguous().T
    plain = ops.block_embed(torch.tensor(BLOCKS), table, 20, 19)
    assert torch.equal(ops.block_embed(ids, table.T.contiguous().T, 20, 19), plain)


def test_block_embed_does_not_read_ids_after_the_end() -> None:
    table = randn(32, 8)
    ids = torch.tensor([[21, BLOCK_END, 10**9, -5], [3, 10**9, BLOCK_END, -1]])
    got = ops.block_embed(ids, table, TEXT_VOCAB, BLOCK_END)
    assert torch.equal(got, torch.stack((table[21], 2 * table[3])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.nearest_codes(randn(2, 3, 4), randn(3, 5, 6), randn(3, 5)),
            r"nearest_codes: codebooks must have shape \[N=3, K, d=4\], got \[3, 5, 6\]",
        ),
        (
            lambda: ops.nearest_codes(randn(2, 3, 4), randn(3, 5, 4), randn(3, 5).half()),
            "nearest_codes: norms must be float32, got float16",
        ),
        (
            lambda: ops.nearest_codes(randn(2, 3, 4), randn(3, 0, 4), randn(3, 0)),
            "nearest_codes: codebooks must have 1 to",
        ),
        (
            lambda: ops.nearest_codes(randn(2, 3, 4), randn(3, 5, 4), randn(3, 5), randn(3, 4)),
            "nearest_codes: ln_weight and ln_bias must both be given or both be None",
        ),
        (
            lambda: ops.block_embed(torch.tensor([[1, 2]], dtype=torch.int32), randn(9, 4), 5, 4),
            "block_embed: ids must be int64, got int32",
        ),
        (
            lambda: ops.block_embed(torch.tensor([[4, 4], [9, 4]]), randn(9, 4), 5, 4),
            "block_embed: ids must be rows of table, 0 <= id < VT=9, got 9 in row 1",
        ),
    ],
)
def test_errors_name_the_rule(call: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()  # type: ignore[operator]


def test_opcheck() -> None:
    z, codebooks, weight, bias = inputs((3, 2, 8, 4), torch.float32, "cpu")
    norms = ops.codebook_norms(codebooks)
    opcheck(torch.ops.kelix.nearest_codes.default, z, codebooks, norms, weight, bias, 1e-5, False)
    opcheck(torch.ops.kelix.block_embed.default, torch.tensor(BLOCKS), randn(32, 8), 20, 19)
