"""The backbone against plain float64 torch, and its paged cache against itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kelix_rt.config import QwenConfig
from kelix_rt.errors import InputError
from kelix_rt.memory import kv_bytes_per_block
from kelix_rt.models.backbone import PagedKV, StepContext, rope_table
from kelix_rt.models.language_model import KelixLM
from tests.models import toy_llm as toy

TOLERANCE = 3e-5
BLOCKS = torch.cat(
    (toy.text(1, 2, 3, toy.VISION_START), toy.image((0, 1, 2), (7, 7, 7)), toy.text(5, 6))
)


def load(path: Path, **qwen: Any) -> tuple[KelixLM, toy.PlainLM]:
    config = toy.config_json(qwen)
    state = toy.random_state(config)
    return KelixLM.from_pretrained(toy.write(path, config, state)), toy.PlainLM(config, state)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> KelixLM:
    return load(tmp_path_factory.mktemp("toy"))[0]


def run_chunks(
    lm: KelixLM,
    requests: Sequence[Tensor],
    chunks: Sequence[Sequence[int]],
    pages: Sequence[Sequence[int]],
    page_size: int,
) -> list[Tensor]:
    """States of each request when it is fed in these chunks; step i runs every i-th chunk."""
    num_pages = max(max(own) for own in pages) + 1
    kv = PagedKV.allocate(lm.config.qwen_config, num_pages, page_size)
    kv.k.fill_(float("nan")), kv.v.fill_(float("nan"))
    done = [0] * len(requests)
    states: list[list[Tensor]] = [[] for _ in requests]
    for step in range(max(map(len, chunks))):
        live = [r for r, own in enumerate(chunks) if step < len(own)]
        counts = [chunks[r][step] for r in live]
        starts = [done[r] for r in live]
        ids = torch.cat(
            [requests[r][s : s + c] for r, s, c in zip(live, starts, counts, strict=True)]
        )
        ctx = StepContext.of_chunks([pages[r] for r in live], starts, counts, page_size)
        for r, part in zip(live, lm(ids, ctx, kv).split(counts), strict=True):
            states[r].append(part)
            done[r] += len(part)
    return [torch.cat(parts) for parts in states]


@pytest.mark.parametrize(
    "qwen",
    [
        {},
        {"q_proj_bias": True, "k_proj_bias": True, "v_proj_bias": True},
        {"k_proj_bias": True},
        {"q_norm": False},
        {"k_norm": False, "v_proj_bias": True},
        {"q_norm": False, "k_norm": False, "num_kv_heads": 4},
        {"num_heads": 3, "num_kv_heads": 1, "head_dim": 10, "norm_eps": 1e-3},
        {"num_layers": 1},
    ],
)
@torch.inference_mode()
def test_matches_plain_torch_under_every_option(tmp_path: Path, qwen: dict[str, Any]) -> None:
    lm, plain = load(tmp_path, **qwen)
    states = lm.hidden_states(BLOCKS)
    assert len(states) == lm.config.qwen_config.num_layers + 1
    torch.testing.assert_close(states[-1].double(), plain.hidden(BLOCKS), atol=TOLERANCE, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 5], [5, 1, 2], [7, 1]])
def test_chunked_paged_prefill_equals_the_whole_prompt(
    lm: KelixLM, page_size: int, chunks: list[int]
) -> None:
    pages = [[4, 9, 2, 7, 0, 8, 3, 5][: -(-8 // page_size)]]
    got = run_chunks(lm, [BLOCKS], [chunks], pages, page_size)[0]
    torch.testing.assert_close(got, lm.hidden_states(BLOCKS)[-1], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_batch_of_mixed_lengths_equals_each_alone(lm: KelixLM) -> None:
    requests = [BLOCKS, BLOCKS[2:5], BLOCKS.flip(0), BLOCKS[:1]]
    chunks = [[5, 1, 1, 1], [3], [1, 6, 1], [1]]
    pages = [[3, 0, 7, 4], [1, 11], [2, 10, 5, 8], [6]]
    for request, got in zip(requests, run_chunks(lm, requests, chunks, pages, 2), strict=True):
        torch.testing.assert_close(got, lm.hidden_states(request)[-1], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_forward_leaves_its_input_and_unused_pages_alone(lm: KelixLM) -> None:
    kv = PagedKV.allocate(lm.config.qwen_config, 3, 4)
    kv.k.fill_(7.0), kv.v.fill_(7.0)
    ctx = StepContext.of_chunks([[1]], [0], [3], 4)
    embeds = lm.embed_blocks(BLOCKS[:3])
    before = embeds.clone()
    lm.backbone(embeds, ctx, kv)
    assert torch.equal(embeds, before)
    assert bool((kv.k[:, [0, 2]] == 7.0).all())
    assert bool((kv.v[:, 1, :, 3] == 7.0).all())
    assert (kv.k[:, 1, :, :3].abs().sum(-1) > 0).all()


@torch.inference_mode()
def test_graph_padding_rows_do_not_touch_real_requests(lm: KelixLM) -> None:
    kv = PagedKV.allocate(lm.config.qwen_config, 2, 8)
    kv.k.zero_()
    alone = lm(BLOCKS[:1], StepContext.of_chunks([[1]], [0], [1], 8), kv)
    stored = kv.k.clone()
    ctx = StepContext(
        positions=torch.zeros(3, dtype=torch.int32),
        slots=torch.tensor([8, -1, -1]),
        page_table=torch.tensor([[1], [0], [0]], dtype=torch.int32),
        context_lens=torch.tensor([1, 0, 0], dtype=torch.int32),
        query_start=torch.tensor([0, 1, 2, 3], dtype=torch.int32),
    )
    padded = lm(BLOCKS[:1].expand(3, -1), ctx, kv)
    torch.testing.assert_close(padded[:1], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(kv.k, stored, atol=1e-6, rtol=0)
    assert padded.isfinite().all()


def test_rope_table_uses_rope_base() -> None:
    config = QwenConfig(tie_word_embeddings=False, head_dim=8, rope_base=100.0, max_seq_len=50)
    table = rope_table(config)
    assert table.shape == (50, 8)
    angle = 49 * 100.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    want = torch.cat((angle.cos(), angle.sin())).float()
    torch.testing.assert_close(table[49], want, atol=1e-5, rtol=0)


def test_the_ledger_books_what_a_page_takes(lm: KelixLM) -> None:
    kv = PagedKV.allocate(lm.config.qwen_config, 5, 4, dtype=torch.bfloat16)
    assert (kv.num_pages, kv.page_size) == (5, 4)
    booked = kv_bytes_per_block(lm.config, torch.bfloat16)
    assert booked * 5 * 4 == kv.k.nbytes + kv.v.nbytes


def test_a_prompt_beyond_max_seq_len_is_refused(lm: KelixLM) -> None:
    with pytest.raises(InputError, match="at most 64 blocks, got 65"):
        lm.hidden_states(toy.text(*[1] * 65))
