"""A visual block of the mid-size language model against the released algorithm in plain torch.

Floor: the weights one block must read. Mid-size, float32: backbone 8 x 12.6 MB, head rows of
slot 0 (34,816 x 512) 71 MB, seven sub-codebooks 29 MB, Block Decoder 4.5 MB: about 205 MB, which
two cores of a server read in 7 to 12 ms.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.checkpoints import MID_SIZE
from benchmarks.reference_llm import ReferenceLM
from kelix_rt.models.backbone import PagedKV, StepContext
from kelix_rt.models.language_model import KelixLM
from kelix_rt.testing import median_seconds

QWEN = MID_SIZE["qwen_config"]
BOOK = QWEN["codebook_size"] // QWEN["n_q_tokens"]
CONTEXT = 64


def prompt_rows(count: int) -> Tensor:
    """Text rows [count, N + 1]."""
    rows = torch.full((count, QWEN["n_q_tokens"] + 1), QWEN["q_eos_token"])
    rows[:, 0] = torch.arange(count) + 100
    return rows


def visual_row() -> Tensor:
    """One row of codes [1, N + 1]."""
    slots = torch.arange(QWEN["n_q_tokens"])
    codes = QWEN["vocab_size"] + slots * BOOK + 7
    return torch.cat((codes, torch.tensor([QWEN["q_eos_token"]]))).unsqueeze(0)


class DecodeLoop:
    """The package's model decoding `batch` requests whose next blocks are visual ones.

    Random weights pick text more often than codes at slot 0, and a text block costs only one slot,
    so the head's text rows are scaled down.
    """

    def __init__(self, path: Path, batch: int, temperature: float) -> None:
        self.lm = KelixLM.from_pretrained(path)
        force_visual(self.lm.head)
        pages = -(-(CONTEXT + 1) // 16)
        self.kv = PagedKV.allocate(self.lm.config.qwen_config, batch * pages, 16)
        tables = [list(range(b * pages, (b + 1) * pages)) for b in range(batch)]
        prefill = StepContext.of_chunks(tables, [0] * batch, [CONTEXT] * batch, 16)
        self.lm(prompt_rows(CONTEXT).repeat(batch, 1), prefill, self.kv)
        self.ctx = StepContext.of_chunks(tables, [CONTEXT] * batch, [1] * batch, 16)
        self.rows = visual_row().repeat(batch, 1)
        params = torch.tensor([temperature, 50.0, 0.9, 0.0])
        self.params = params.expand(batch, QWEN["n_q_tokens"] + 1, 4).contiguous()
        self.seeds = torch.arange(batch)
        self.steps = torch.zeros(batch, dtype=torch.int64)

    def step(self) -> Tensor:
        """Feed one visual block per request, return the next blocks [batch, N + 1]."""
        hidden = self.lm(self.rows, self.ctx, self.kv)
        ids, _ = self.lm.decode_blocks(hidden, self.params, self.seeds, self.steps)
        return ids


def force_visual(head: Tensor) -> None:
    """Make the first sub-codebook win slot 0 whatever the state.

    Text logits shrink to nothing, and the largest of 2,048 random logits is far above zero.
    """
    with torch.no_grad():
        head[: QWEN["vocab_size"]] *= 1e-3


@pytest.fixture(scope="module")
def reference(mid_size: Path) -> ReferenceLM:
    """The released algorithm on the same weights, its context filled."""
    tensors = load_file(mid_size / "model.safetensors")
    force_visual(tensors["model.model.output.weight"])
    return ReferenceLM(MID_SIZE, tensors)


def reference_step(reference: ReferenceLM) -> Tensor:
    """One visual block of the reference at the benchmark's context length."""
    keys, values = list(reference.keys), list(reference.values)
    block = reference.step(visual_row(), temperature=0.7, top_k=50, top_p=0.9)
    reference.keys, reference.values = keys, values
    return block


def assert_best_of_each_book(reference: ReferenceLM, block: Tensor) -> None:
    """The reference's own logits along `block` peak, in every slot's sub-codebook, at its id.

    (Over the whole vocabulary random weights peak anywhere; a trained head peaks in the book.)
    """
    keys, values = list(reference.keys), list(reference.values)
    hidden = reference.backbone(visual_row())
    reference.keys, reference.values = keys, values
    inputs = torch.cat((hidden, reference.table[block[:-2]])).unsqueeze(0)
    for slot, logits in enumerate(reference.token_head(inputs)[0]):
        first = QWEN["vocab_size"] + slot * BOOK
        assert first + int(logits[first : first + BOOK].argmax()) == int(block[slot])


@torch.inference_mode()
def test_visual_block_against_reference(
    benchmark: BenchmarkFixture, mid_size: Path, reference: ReferenceLM
) -> None:
    reference.reset()
    reference.backbone(prompt_rows(CONTEXT))
    greedy = DecodeLoop(mid_size, batch=1, temperature=0.0).step()
    assert_best_of_each_book(reference, greedy[0])

    sampled = DecodeLoop(mid_size, batch=1, temperature=0.7)
    theirs = median_seconds(lambda: reference_step(reference), repeats=5)
    block = benchmark(sampled.step)
    assert bool((block[:, :-1] >= QWEN["vocab_size"]).all()), "the timed block must be visual"
    mine = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "reference_ms": round(theirs * 1e3, 1),
        "visual_block_ms": round(mine * 1e3, 2),
        "ratio": round(theirs / mine, 1),
    }
    print(
        f"\nvisual block {mine * 1e3:.1f} ms, reference {theirs * 1e3:.1f} ms, "
        f"ratio {theirs / mine:.1f}"
    )
    assert theirs / mine >= 5


@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.inference_mode()
def test_visual_block_batched(benchmark: BenchmarkFixture, mid_size: Path, batch: int) -> None:
    loop = DecodeLoop(mid_size, batch=batch, temperature=0.7)
    block = benchmark(loop.step)
    assert block.shape == (batch, QWEN["n_q_tokens"] + 1)
    benchmark.extra_info["blocks_per_second"] = round(batch / benchmark.stats.stats.median, 1)
