"""Drawing from 64 rows of one sub-codebook (8,192 wide) and from the open first slot (160,128)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.compare import Call, Comparison
from benchmarks.peers import compiled, installed
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


def flashinfer_draw(logits: Tensor) -> Call | str:
    """FlashInfer's rejection sampling from probabilities, the softmax included."""
    if not logits.is_cuda:
        return "needs a GPU"
    flashinfer = installed("flashinfer")
    if flashinfer is None:
        return "not installed"

    def draw() -> Tensor:
        probs = (logits / TEMPERATURE).softmax(-1)
        return flashinfer.sampling.top_k_top_p_sampling_from_probs(
            probs, TOP_K, TOP_P, filter_apply_order="top_k_first"
        )

    return draw


@pytest.mark.parametrize(("rows", "width"), [(64, 8192), (8, 160128)])
@torch.inference_mode()
def test_sample_blocks(compare: Comparison, device: str, rows: int, width: int) -> None:
    logits = randn(rows, width, device=device, scale=4.0)
    params = torch.tensor([TEMPERATURE, TOP_K, TOP_P, 0.0], device=device)
    params = params.expand(rows, 4).contiguous()
    keys = torch.arange(rows, device=device)
    kept = logits.topk(TOP_K, -1).indices
    peers: dict[str, Call | str] = {
        "topk_sort_multinomial": lambda: torch_draw(logits),
        "compiled": compiled(lambda: torch_draw(logits)),
        "flashinfer": flashinfer_draw(logits),
    }

    def ours() -> Tensor:
        return ops.sample_blocks(logits, params, keys, keys, keys)[0]

    for name, call in {"ours": ours, **peers}.items():
        if not isinstance(call, str):
            drawn = call().unsqueeze(1)
            assert bool((drawn == kept).any(-1).all()), f"{name} drew outside the top k"
    compare(ours, peers, num_bytes=logits.numel() * 4)
