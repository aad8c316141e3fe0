"""nearest_codes at the released size: 8 books of 8,192 codes of 128 channels.

324 tokens are the image a drawing is made of, 1,225 and 1,369 those of larger ones that are read.
Floors: 17 MFLOP of products per token, which the bare batched GEMM measures; 35 MB of inputs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.compare import Call, Comparison
from benchmarks.peers import compiled, installed
from kelix_rt import ops
from kelix_rt.ops._codes_forms import forms_for
from kelix_rt.testing import randn

BOOKS, CODES, DIM = 8, 8192, 128


def faiss_search(z: Tensor, books: Tensor) -> Call | str:
    """Exact search in one flat index per book, on the CPU."""
    faiss = installed("faiss")
    if faiss is None:
        return "not installed"
    if z.is_cuda:
        return "its CPU build cannot take GPU tensors"
    faiss.omp_set_num_threads(torch.get_num_threads())
    indexes = []
    for book in books.float().numpy():
        index = faiss.IndexFlatL2(DIM)
        index.add(book)
        indexes.append(index)
    queries = [z[:, n].float().contiguous().numpy() for n in range(BOOKS)]

    def search() -> Tensor:
        found = [index.search(q, 1)[1] for index, q in zip(indexes, queries, strict=True)]
        return torch.stack([torch.from_numpy(ids[:, 0]) for ids in found], 1)

    return search


def vector_quantize(z: Tensor, books: Tensor) -> Call | str:
    """vector-quantize-pytorch with a head per book, in the dtype of the inputs."""
    library = installed("vector_quantize_pytorch")
    if library is None:
        return "not installed"
    quantizer = library.VectorQuantize(
        dim=BOOKS * DIM,
        codebook_size=CODES,
        codebook_dim=DIM,
        heads=BOOKS,
        separate_codebook_per_head=True,
    )
    quantizer = quantizer.to(z.device, z.dtype).eval()
    quantizer._codebook.embed.data.copy_(books)
    flat = z.flatten(1).unsqueeze(0)
    return lambda: quantizer(flat)[1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [324, 1225, 1369])
@torch.inference_mode()
def test_nearest_codes(compare: Comparison, device: str, tokens: int, dtype: torch.dtype) -> None:
    z = randn(tokens, BOOKS, DIM, dtype=dtype, device=device)
    books = randn(BOOKS, CODES, DIM, dtype=dtype, device=device, seed=1)
    norms = ops.codebook_norms(books)
    by_book, transposed = z.transpose(0, 1).contiguous(), books.transpose(1, 2)
    wide, wide_books = by_book.float(), books.float()

    def gemm_argmin() -> Tensor:
        return (norms.unsqueeze(1) - 2 * torch.bmm(by_book, transposed)).argmin(-1).t()

    distances = z.new_empty(tokens, CODES)

    def gemm_argmin_by_book() -> Tensor:
        """One book after the other, into memory that is kept."""
        found = []
        for own, tokens_of, codes_of in zip(norms.to(dtype), by_book, transposed, strict=True):
            torch.addmm(own, tokens_of, codes_of, alpha=-2, out=distances)
            found.append(distances.argmin(-1))
        return torch.stack(found, dim=1)

    products = z.new_empty(BOOKS, tokens, CODES)
    # The forms that `ops.tune_nearest_codes` chooses from; without tuning "ours" is the kernel.
    others = {
        name: partial(form, z, books, norms)
        for name, form in forms_for(books).items()
        if name != "kernel"
    }
    absent = {"product", "cutlass"} - others.keys()
    peers: dict[str, Call | str] = {
        **{f"our_{name}_form": call for name, call in others.items()},
        **{f"our_{name}_form": "does not run on this device in this dtype" for name in absent},
        "cdist_argmin": lambda: torch.cdist(wide, wide_books).argmin(-1).t(),
        "compiled_gemm_argmin": compiled(gemm_argmin),
        "gemm_argmin_by_book": gemm_argmin_by_book,
        "faiss": faiss_search(z, books),
        "vector_quantize_pytorch": vector_quantize(z, books),
    }
    exact = (norms.unsqueeze(1) - 2 * torch.bmm(wide, wide_books.transpose(1, 2))).argmin(-1)
    for name, call in {"ours": lambda: ops.nearest_codes(z, books, norms), **peers}.items():
        # Rounded products tie, so the peers that round them differ more; our forms do not.
        if not isinstance(call, str):
            same = (call() == exact.t()).float().mean()
            unrounded = name.startswith("our") or name in ("faiss", "cdist_argmin")
            least = 0.999 if unrounded else 0.8
            assert same > least, f"{name} agrees on {same:.4f} of the codes only"
    compare(
        lambda: ops.nearest_codes(z, books, norms),
        peers,
        {"bare_gemm": lambda: torch.bmm(by_book, transposed, out=products)},
        flops=2 * tokens * BOOKS * CODES * DIM,
        dtype=dtype,
        repeats=5 if tokens < 1000 else 2,
    )
