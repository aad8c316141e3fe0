"""Decoding attention over pages: batch 16, context 2,048, 32 query and 8 KV heads of 128.

Floor: the 268 MB (float32) of keys and values are read once.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.compare import against_peers
from kelix_rt import ops
from kelix_rt.testing import randn

BATCH, CONTEXT, HEADS, KV_HEADS, DIM, PAGE = 16, 2048, 32, 8, 128, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_decode(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    pages = BATCH * CONTEXT // PAGE
    k = randn(pages, KV_HEADS, PAGE, DIM, dtype=dtype)
    v = randn(pages, KV_HEADS, PAGE, DIM, dtype=dtype, seed=1)
    q = randn(BATCH, HEADS, DIM, dtype=dtype, seed=2)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(3))
    table = order.int().view(BATCH, -1)
    lengths = torch.full((BATCH,), CONTEXT, dtype=torch.int32)
    starts = torch.arange(BATCH + 1, dtype=torch.int32)

    def ours() -> Tensor:
        return ops.paged_attention(q, k, v, table, lengths, starts, DIM**-0.5)

    def gather_sdpa() -> Tensor:
        rows = table.long()
        keys, values = (
            cache[rows].transpose(1, 2).flatten(2, 3).repeat_interleave(HEADS // KV_HEADS, 1)
            for cache in (k, v)
        )
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values).squeeze(2)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours(), gather_sdpa(), atol=tolerance, rtol=tolerance)
    against_peers(
        benchmark,
        ours,
        {"gather_sdpa": gather_sdpa},
        {"read_once": lambda: (k.view(torch.int16).max(), v.view(torch.int16).max())},
    )
