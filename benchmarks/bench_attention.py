"""Decoding attention over pages: batch 16, context 2,048, 32 query and 8 KV heads of 128.

Floor: the 268 MB (float32; 134 in bfloat16, 67 in float8) of keys and values are read once.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Call, Comparison
from benchmarks.peers import compiled, installed
from kelix_rt import ops
from kelix_rt.testing import randn

BATCH, CONTEXT, HEADS, KV_HEADS, DIM, PAGE = 16, 2048, 32, 8, 128, 16


def flashinfer_decode(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Call | str:
    """FlashInfer's decode wrapper over the same pages, planned before it is timed."""
    if not q.is_cuda:
        return "needs a GPU"
    flashinfer = installed("flashinfer")
    if flashinfer is None:
        return "not installed"
    if q.dtype == torch.float32:
        return "has no float32"
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    starts = torch.arange(BATCH + 1, dtype=torch.int32, device=q.device) * table.shape[1]
    last = torch.full((BATCH,), PAGE, dtype=torch.int32, device=q.device)
    wrapper.plan(starts, table.flatten(), last, HEADS, KV_HEADS, DIM, PAGE, q_data_type=q.dtype)
    return lambda: wrapper.run(q, (k, v))


class Decode:
    """A full batch: queries [B, H, hd], a cache, and a call of the operator."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        pages = BATCH * CONTEXT // PAGE
        self.k = randn(pages, KV_HEADS, PAGE, DIM, dtype=dtype, device=device)
        self.v = randn(pages, KV_HEADS, PAGE, DIM, dtype=dtype, device=device, seed=1)
        self.q = randn(BATCH, HEADS, DIM, dtype=dtype, device=device, seed=2)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(3))
        self.table = order.int().view(BATCH, -1).to(device)
        self.lengths = torch.full((BATCH,), CONTEXT, dtype=torch.int32, device=device)
        self.starts = torch.arange(BATCH + 1, dtype=torch.int32, device=device)

    def attend(self, k: Tensor, v: Tensor) -> Tensor:
        """The operator over this cache."""
        return ops.paged_attention(self.q, k, v, self.table, self.lengths, self.starts, DIM**-0.5)


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@DTYPES
@torch.inference_mode()
def test_decode(compare: Comparison, device: str, dtype: torch.dtype) -> None:
    case = Decode(device, dtype)
    q, k, v, table = case.q, case.k, case.v, case.table

    def ours() -> Tensor:
        return case.attend(k, v)

    rows, grouped = table.long(), q.unflatten(1, (KV_HEADS, -1))

    def gather_sdpa() -> Tensor:
        """The query heads of a group are rows over its keys, which so need not be repeated."""
        keys, values = (cache[rows].transpose(1, 2).flatten(2, 3) for cache in (k, v))
        return F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2)

    peers: dict[str, Call | str] = {
        "gather_sdpa": gather_sdpa,
        "compiled": compiled(gather_sdpa),
        "flashinfer": flashinfer_decode(q, k, v, table),
    }
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for call in peers.values():
        if not isinstance(call, str):
            torch.testing.assert_close(ours(), call(), atol=tolerance, rtol=tolerance)
    compare(
        ours,
        peers,
        {"read_once": lambda: (k.view(torch.int16).max(), v.view(torch.int16).max())},
        num_bytes=2 * k.numel() * dtype.itemsize,
        repeats=2,
    )


@DTYPES
@torch.inference_mode()
def test_decode_float8_cache(compare: Comparison, device: str, dtype: torch.dtype) -> None:
    """A cache of a quarter or half of the bytes against one in the dtype of the queries."""
    case = Decode(device, dtype)
    k, v = (cache.to(torch.float8_e4m3fn) for cache in (case.k, case.v))
    torch.testing.assert_close(
        case.attend(k, v), case.attend(k.to(dtype), v.to(dtype)), atol=2e-2, rtol=2e-2
    )
    compare(
        lambda: case.attend(k, v),
        {"cache_in_dtype": lambda: case.attend(case.k, case.v)},
        {"read_once": lambda: (k.view(torch.int16).max(), v.view(torch.int16).max())},
        num_bytes=2 * k.numel(),
    )
