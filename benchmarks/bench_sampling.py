"""Drawing from 64 rows of one sub-codebook (8,192 wide) and from the open first slot (160,128)."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.compare import against_peers
from kelix_rt import ops
from kelix_rt.testing import randn

TEMPERATURE, TOP_K, TOP_P = 0.7, 50, 0.9


def torch_draw(logits: Tensor) -> Tensor:
    """What serving code without a kernel does: top-k, full sort for top-p, multinomial."""
    scores = logits / TEMPERATURE
    kth = scores.topk(TOP_K, -1).values[:, -1:]
    scores = scores.masked_fill(scores < kth, -torch.inf)
    ordered, order = scores.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= TOP_P, -torch.inf)
    kept = torch.full_like(scores, -torch.inf).scatter(1, order, ordered)
    return torch.multinomial(kept.softmax(-1), 1).squeeze(1)


@pytest.mark.parametrize(("rows", "width"), [(64, 8192), (8, 160128)])
@torch.inference_mode()
def test_sample_blocks(benchmark: BenchmarkFixture, rows: int, width: int) -> None:
    logits = randn(rows, width, scale=4.0)
    params = torch.tensor([TEMPERATURE, TOP_K, TOP_P, 0.0]).expand(rows, 4).contiguous()
    keys = torch.arange(rows)

    def ours() -> Tensor:
        return ops.sample_blocks(logits, params, keys, keys, keys)[0]

    kept = logits.topk(TOP_K, -1).indices
    assert bool((ours().unsqueeze(1) == kept).any(-1).all()), "drawn outside the top k"
    against_peers(benchmark, ours, {"topk_sort_multinomial": lambda: torch_draw(logits)})
