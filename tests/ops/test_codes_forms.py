"""The forms of nearest_codes agree, and the fastest of them is measured once and remembered."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from kelix_rt.ops import _codes_forms as forms
from tests.ops.helpers import DEVICES, DTYPES, opcheck, randn

# (tokens, books, codes, dim)
SHAPES = [(1, 1, 1, 8), (5, 3, 37, 16), (0, 2, 8, 8), (33, 8, 512, 128), (257, 2, 300, 64),
          (130, 1, 129, 72)]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(forms, "CHOSEN", {})
    yield


def books_and_norm(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    _, books, codes, dim = shape
    codebooks = randn(books, codes, dim, dtype=dtype, device=device, seed=1)
    weight = 1 + randn(books, dim, dtype=dtype, device=device, seed=2, scale=0.1)
    bias = randn(books, dim, dtype=dtype, device=device, seed=3, scale=0.1)
    return codebooks, weight, bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_forms_find_the_same_codes(
    normed: bool,
    reference: bool,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forms, "DISTANCE_BYTES", 100 << 10)  # several parts, the last one cut
    z = randn(shape[0], shape[1], shape[3], dtype=dtype, device=device) + 0.5
    codebooks, *affine = books_and_norm(shape, dtype, device)
    inputs = (z, codebooks, ops.codebook_norms(codebooks, reference))
    norm = affine if normed else [None, None]
    want = ops.nearest_codes_ref(*inputs, *norm, 1e-5, reference)
    for name, form in forms.forms_for(codebooks).items():
        got = form(*inputs, *norm, 1e-5, reference)
        assert got.dtype == torch.int64
        assert got.shape == z.shape[:2]
        # Values may fall on the other side of a rounding, and then on another code.
        assert (got != want).sum() <= 0.01 * got.numel(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", [False, True])
def test_forms_agree_to_the_last_tie(reference: bool, dtype: torch.dtype, device: str) -> None:
    """Small integers are exact in every dtype and sum order."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randint(-3, 4, (200, 2, 64), generator=generator).to(device, dtype)
    codebooks = torch.randint(-3, 4, (2, 700, 64), generator=generator).to(device, dtype)
    norms = ops.codebook_norms(codebooks, reference)
    want = ops.nearest_codes_ref(z, codebooks, norms, reference=reference)
    for name, form in forms.forms_for(codebooks).items():
        got = form(z, codebooks, norms, None, None, 1e-5, reference)
        assert torch.equal(got, want), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reference", [False, True])
def test_forms_give_a_nan_row_zero(reference: bool, device: str) -> None:
    z = randn(20, 2, 16, dtype=torch.bfloat16, device=device)
    codebooks = randn(2, 50, 16, dtype=torch.bfloat16, device=device, seed=1)
    norms = ops.codebook_norms(codebooks, reference)
    for name, form in forms.forms_for(codebooks).items():
        broken = z.clone()
        broken[3, 1, 5] = float("nan")
        want = form(z, codebooks, norms, None, None, 1e-5, reference)
        want[3, 1] = 0
        got = form(broken, codebooks, norms, None, None, 1e-5, reference)
        assert torch.equal(got, want), name


def test_the_product_form_holds_few_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 tokens have 65 MB of distances here: no two parts of them are alive at once."""
    product, made = forms._float32_product, []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        assert all(other() is None for other in made)
        dots = product(a, b)
        assert dots.nbytes <= forms.DISTANCE_BYTES
        made.append(weakref.ref(dots))
        return dots

    monkeypatch.setattr(forms, "_float32_product", watched)
    z, codebooks = randn(2000, 4, 16), randn(4, 2048, 16, seed=1)
    norms = ops.codebook_norms(codebooks)
    got = forms.nearest_codes_product(z, codebooks, norms)
    assert len(made) == 4
    assert torch.equal(got, ops.nearest_codes(z, codebooks, norms))


def timer(times: list[float]) -> tuple[Callable[[Callable[[], object]], float], list[object]]:
    """A stand-in that answers with these times in turn, and what its calls returned."""
    returned: list[object] = []

    def seconds(call: Callable[[], object]) -> float:
        returned.append(call())
        return times[len(returned) - 1]

    return seconds, returned


def stand_in(name: str, calls: list[str]) -> forms.Form:
    def form(*inputs: object) -> Tensor:
        calls.append(name)
        return torch.ops.kelix.nearest_codes(*inputs)

    return form


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of three forms ran; all are the kernel."""
    calls: list[str] = []
    three = {name: stand_in(name, calls) for name in ("kernel", "product", "cutlass")}
    monkeypatch.setattr(forms, "forms_for", lambda codebooks: three)
    return calls


@pytest.mark.parametrize(
    ("times", "fastest"),
    [([1.0, 2.0, 3.0], "kernel"), ([3.0, 1.0, 2.0], "product"), ([3.0, 2.0, 1.0], "cutlass"),
     ([1.0, 1.0, 1.0], "kernel")],
)  # fmt: skip
def test_the_fastest_form_is_taken(times: list[float], fastest: str, calls: list[str]) -> None:
    codebooks, weight, bias = books_and_norm((0, 2, 40, 8), torch.float32)
    norms = ops.codebook_norms(codebooks)
    seconds, returned = timer(times)
    found = ops.tune_nearest_codes(codebooks, norms, weight, bias, tokens=[100], seconds=seconds)
    assert found[100].name == fastest
    assert list(found[100].seconds.values()) == times
    assert len(returned) == 3
    assert all(ids.shape == (100, 2) for ids in returned)  # type: ignore[attr-defined]
    calls.clear()
    z = randn(100, 2, 8)
    got = ops.nearest_codes(z, codebooks, norms, weight, bias)
    assert calls == [fastest]
    assert torch.equal(got, torch.ops.kelix.nearest_codes(z, codebooks, norms, weight, bias))


def test_a_choice_is_made_once_and_holds_for_calls_like_it(calls: list[str]) -> None:
    codebooks = randn(2, 40, 8)
    norms = ops.codebook_norms(codebooks)
    seconds, returned = timer([3.0, 1.0, 2.0])
    for tokens in ([64], [100, 127]):
        ops.tune_nearest_codes(codebooks, norms, tokens=tokens, seconds=seconds)
    assert len(returned) == 3, "64 to 127 tokens are one kind of call"

    def ran(
        tokens: int, books: Tensor = codebooks, reference: bool = False, affine: bool = False
    ) -> list[str]:
        calls.clear()
        z = randn(tokens, books.shape[0], books.shape[2], dtype=books.dtype)
        norm = [torch.ones(2, 8)] * 2 if affine else []
        ops.nearest_codes(
            z, books, ops.codebook_norms(books, reference), *norm, reference=reference
        )
        return list(calls)

    assert ran(64) == ran(127) == ["product"]
    # Everything else takes the kernel, past the table of forms.
    assert ran(63) == ran(128) == ran(0) == []
    assert ran(64, reference=True) == []
    assert ran(64, codebooks.bfloat16()) == []
    assert ran(64, codebooks[:, 1:]) == []
    assert ran(64, affine=True) == []
    for wrong in (randn(64, 2, 8).bfloat16(), randn(64, 8), randn(64, 3, 8)):
        with pytest.raises(RuntimeError, match="nearest_codes: "):
            ops.nearest_codes(wrong, codebooks, norms)


def test_untuned_calls_take_the_kernel(calls: list[str]) -> None:
    codebooks = randn(2, 40, 8)
    ops.nearest_codes(randn(64, 2, 8), codebooks, ops.codebook_norms(codebooks))
    assert not calls
    assert not forms.CHOSEN


def test_a_form_with_other_codes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(z: Tensor, *inputs: object) -> Tensor:
        return torch.zeros(z.shape[:2], dtype=torch.int64)

    both = {"kernel": torch.ops.kelix.nearest_codes, "product": zeros}
    monkeypatch.setattr(forms, "forms_for", lambda codebooks: both)
    codebooks = randn(2, 40, 8)
    norms = ops.codebook_norms(codebooks)
    with pytest.raises(RuntimeError, match=r"form 'product' must find the kernel's codes, got"):
        ops.tune_nearest_codes(codebooks, norms, tokens=[64])
    assert not forms.CHOSEN


def test_tuning_with_the_clock() -> None:
    codebooks = randn(2, 40, 8)
    found = ops.tune_nearest_codes(codebooks, ops.codebook_norms(codebooks), tokens=[3])
    assert set(found[3].seconds) == {"kernel", "product"}
    assert found[3].seconds[found[3].name] == min(found[3].seconds.values()) > 0


def test_numbers_of_tokens_are_positive() -> None:
    codebooks = randn(2, 40, 8)
    with pytest.raises(ValueError, match=r"tokens must be positive, got \[5, 0\]"):
        ops.tune_nearest_codes(codebooks, ops.codebook_norms(codebooks), tokens=[5, 0])


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.float32, 8, "z must be bfloat16 or float16, got float32"),
        (torch.bfloat16, 12, r"z must have a d that is a multiple of 8, got \[4, 2, 12\]"),
        (torch.bfloat16, 8, "z must be on a GPU .*, got a CPU tensor"),
    ],
)
def test_errors_name_the_rule(dtype: torch.dtype, dim: int, message: str) -> None:
    z, codebooks = randn(4, 2, dim, dtype=dtype), randn(2, 5, dim, dtype=dtype)
    with pytest.raises(RuntimeError, match="nearest_codes_cutlass: " + message):
        forms.nearest_codes_cutlass(z, codebooks, ops.codebook_norms(codebooks))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_opcheck_of_cutlass() -> None:
    z = randn(4, 2, 16, dtype=torch.bfloat16, device="cuda")
    codebooks = randn(2, 50, 16, dtype=torch.bfloat16, device="cuda", seed=1)
    if "cutlass" not in forms.forms_for(codebooks):
        pytest.skip("built without CUTLASS, or a GPU other than sm_90")
    norms = ops.codebook_norms(codebooks)
    opcheck(torch.ops.kelix.nearest_codes_cutlass.default, z, codebooks, norms, None)


def test_a_compiled_call_is_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice is of some sizes, and would make one program of every one of them."""
    books = randn(2, 9, 8)
    norms = ops.codebook_norms(books)
    ops.tune_nearest_codes(books, norms, tokens=[500])
    assert forms.CHOSEN
    compiled = torch.compile(
        lambda z: ops.nearest_codes(z, books, norms), backend="eager", fullgraph=True, dynamic=True
    )
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 2)
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    for tokens in range(2, 12):
        z = randn(tokens, 2, 8)
        assert torch.equal(compiled(z), ops.nearest_codes(z, books, norms))
