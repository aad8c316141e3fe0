"""Blocks of the mid-size language model, against the released algorithm and transformers' Qwen3.

Floor: the weights one block must read. Mid-size, float32: backbone 8 x 12.6 MB, head rows of
slot 0 (34,816 x 512) 71 MB, seven sub-codebooks 29 MB, Block Decoder 4.5 MB: about 205 MB, which
two cores of a server read in 7 to 12 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.checkpoints import MID_SIZE, prefer_text
from benchmarks.compare import Comparison, Machine
from benchmarks.decode_loop import GREEDY, QWEN, SAMPLED, DecodeLoop, text_rows, visual_row
from benchmarks.reference_llm import ReferenceLM
from kelix_rt import Engine, SamplingParams
from kelix_rt.config import Quantization
from kelix_rt.models.language_model import KelixLM

CONTEXT, LONG = 64, 2048
VISUAL_BYTES, TEXT_BYTES = 205_000_000, 176_000_000
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def lm(mid_size: Path, device: str) -> KelixLM:
    """The package's model; its greedy blocks are visual."""
    return KelixLM.from_pretrained(mid_size, device)


@pytest.fixture(scope="module")
def writer(mid_size: Path, device: str) -> KelixLM:
    """The same, but its blocks are text."""
    lm = KelixLM.from_pretrained(mid_size, device)
    prefer_text(lm.head)
    return lm


@pytest.fixture(scope="module")
def reference(mid_size: Path, device: str) -> ReferenceLM:
    """The released algorithm on the same weights, its context filled."""
    tensors = load_file(mid_size / "model.safetensors", device=device)
    reference = ReferenceLM(MID_SIZE, tensors)
    with torch.device(device), torch.inference_mode():
        reference.backbone(text_rows(CONTEXT).to(device))
    return reference


def reference_step(reference: ReferenceLM, device: str, top_k: int) -> Tensor:
    """One visual block of the reference at the benchmark's context length."""
    keys, values = list(reference.keys), list(reference.values)
    with torch.device(device):
        block = reference.step(visual_row().to(device), temperature=0.7, top_k=top_k, top_p=0.9)
    reference.keys, reference.values = keys, values
    return block


@torch.inference_mode()
def test_visual_block_against_the_release(
    compare: Comparison, device: str, lm: KelixLM, reference: ReferenceLM
) -> None:
    greedy = DecodeLoop(lm, 1, CONTEXT, GREEDY, visual_row()).step()[0]
    assert torch.equal(greedy, reference_step(reference, device, top_k=1))

    sampled = DecodeLoop(lm, 1, CONTEXT, SAMPLED, visual_row())
    assert bool((sampled.step()[:, :-1] >= QWEN["vocab_size"]).all()), "the block must be visual"
    ratios = compare(
        sampled.step,
        {"released": lambda: reference_step(reference, device, top_k=50)},
        num_bytes=VISUAL_BYTES,
        graph=False,
    )
    assert ratios["released"] >= 8


def time_blocks(
    compare: Comparison, step: Callable[[], Tensor], batch: int, num_bytes: int
) -> None:
    """Times a loop's step, whose weights are read once for the whole batch."""
    compare(step, {}, num_bytes=num_bytes, graph=False)
    milliseconds = compare.benchmark.extra_info["ms"]
    compare.record({"blocks_per_second": round(batch / milliseconds * 1e3, 1)})


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("context", [CONTEXT, LONG])
@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.inference_mode()
def test_visual_block(
    compare: Comparison, lm: KelixLM, batch: int, context: int, sampling: tuple[float, ...]
) -> None:
    loop = DecodeLoop(lm, batch, context, sampling, visual_row())
    assert bool((loop.step()[:, :-1] >= QWEN["vocab_size"]).all()), "the block must be visual"
    time_blocks(compare, loop.step, batch, VISUAL_BYTES + kv_bytes(batch, context))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("context", [CONTEXT, LONG])
@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.inference_mode()
def test_text_block(
    compare: Comparison, writer: KelixLM, batch: int, context: int, sampling: tuple[float, ...]
) -> None:
    loop = DecodeLoop(writer, batch, context, sampling, text_rows(1))
    assert bool((loop.step()[:, 0] < QWEN["vocab_size"]).all()), "the block must be text"
    time_blocks(compare, loop.step, batch, TEXT_BYTES + kv_bytes(batch, context))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
@torch.inference_mode()
def test_visual_block_with_int8_weights(
    compare: Comparison, mid_size: Path, device: str, dtype: torch.dtype, batch: int
) -> None:
    """Backbone and head in int8: 50 MB instead of 201 in float32; the Block Decoder stays."""

    def loop(kind: torch.dtype, quantization: Quantization) -> DecodeLoop:
        model = KelixLM.from_pretrained(mid_size, device, kind, quantization=quantization)
        return DecodeLoop(model, batch, CONTEXT, GREEDY, visual_row())

    int8 = loop(dtype, "int8")
    assert bool((int8.step()[:, :-1] >= QWEN["vocab_size"]).all()), "the block must be visual"
    compare(
        int8.step,
        {
            "float32": loop(torch.float32, None).step,
            "bfloat16": loop(torch.bfloat16, None).step,
        },
        graph=False,
    )


def kv_bytes(batch: int, context: int) -> int:
    """Keys and values a step reads, in float32."""
    return batch * context * 2 * QWEN["num_layers"] * QWEN["num_kv_heads"] * QWEN["head_dim"] * 4


def qwen3(machine: Machine) -> torch.nn.Module:
    """transformers' Qwen3 of the backbone's shapes and vocabulary, with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=QWEN["vocab_size"],
        hidden_size=QWEN["embed_dim"],
        intermediate_size=QWEN["intermediate_dim"],
        num_hidden_layers=QWEN["num_layers"],
        num_attention_heads=QWEN["num_heads"],
        num_key_value_heads=QWEN["num_kv_heads"],
        head_dim=QWEN["head_dim"],
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval().to(machine.device)


@pytest.mark.parametrize("batch", [1, 8])
def test_text_against_transformers(
    compare: Comparison, machine: Machine, mid_size: Path, batch: int
) -> None:
    """Whole calls, prompts of 64 and 32 new tokens. Ours runs the Block Decoder on top of it."""
    engine = Engine.from_pretrained(
        mid_size, device=machine.device, max_model_len=256, prefix_cache=False
    )
    prefer_text(engine.runner.model.head)
    prompts = torch.randint(0, 32000, (batch, 64), generator=torch.Generator().manual_seed(0))
    sampling = SamplingParams(temperature=0.0, max_blocks=NEW_TOKENS, ignore_eos=True)
    peer, ids = qwen3(machine), prompts.to(machine.device)

    def ours() -> None:
        for output in engine.generate([row.tolist() for row in prompts], sampling):
            assert len(output.blocks) == NEW_TOKENS

    def theirs() -> None:
        out = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
        assert out.shape[1] == ids.shape[1] + NEW_TOKENS

    best = machine.best_seconds({"ours": ours, "transformers": theirs})
    compare.benchmark.pedantic(ours, rounds=1)
    tokens = batch * NEW_TOKENS
    compare.record(
        {
            "tokens_per_second": round(tokens / best["ours"], 1),
            "transformers_tokens_per_second": round(tokens / best["transformers"], 1),
            "ratio": round(best["transformers"] / best["ours"], 2),
        }
    )
    assert best["ours"] <= best["transformers"]
