"""nearest_codes at the released shape: 324 tokens x 8 books x 8,192 codes x 128.

Floors: 5.4 GFLOP of products, which the bare batched GEMM measures; 35 MB of inputs.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import against_peers
from kelix_rt import ops
from kelix_rt.testing import randn

TOKENS, BOOKS, CODES, DIM = 324, 8, 8192, 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_nearest_codes(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    z = randn(TOKENS, BOOKS, DIM, dtype=dtype)
    books = randn(BOOKS, CODES, DIM, dtype=dtype, seed=1)
    norms = ops.codebook_norms(books)
    by_book, transposed = z.transpose(0, 1).contiguous(), books.transpose(1, 2)
    wide, wide_books = by_book.float(), books.float()
    ours = ops.nearest_codes(z, books, norms)
    exact = (norms.unsqueeze(1) - 2 * torch.bmm(wide, wide_books.transpose(1, 2))).argmin(-1)
    assert (ours == exact.t()).float().mean() > 0.999, "argmin differs beyond rounding"
    against_peers(
        benchmark,
        lambda: ops.nearest_codes(z, books, norms),
        {"cdist_argmin": lambda: torch.cdist(wide, wide_books).argmin(-1)},
        {"bare_gemm": lambda: torch.bmm(by_book, transposed)},
    )
