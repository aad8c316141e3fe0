"""The start of the language model: heads that look back, heads that compare, copying outputs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from kelix_rt.models.backbone import Attention, DecoderLayer
from kelix_rt.models.language_model import KelixLM
from kelix_rt.ops.attention import normed_rotated
from kelix_rt.train.language_start import EMBEDDING_STD, new_language_model
from kelix_rt.train.recipe import Sizes, language_config

SIZES = Sizes(layers=2)
POSITIONS = 40


@pytest.fixture(scope="module")
def model() -> KelixLM:
    return new_language_model(language_config(SIZES), "cpu", 0)


def attention_of(model: KelixLM, index: int = 1) -> Attention:
    layer = model.backbone.layers[index]
    assert isinstance(layer, DecoderLayer)
    return layer.attention


def inputs() -> torch.Tensor:
    return torch.randn(POSITIONS, SIZES.width, generator=torch.Generator().manual_seed(0))


def scores(model: KelixLM, x: torch.Tensor) -> torch.Tensor:
    """Attention scores [H, query, key] of the second layer for normed inputs x [T, D]."""
    attention = attention_of(model)
    with torch.no_grad():
        q, k, _ = normed_rotated(
            attention._project(x), attention.q_norm, attention.k_norm, model.backbone.cos_sin,
            torch.arange(len(x)), attention.num_heads, attention.head_dim,
        )  # fmt: skip
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("qhd,khd->hqk", q, k)


def test_heads_of_the_first_group_look_back(model: KelixLM) -> None:
    found = scores(
        model, torch.randn(POSITIONS, SIZES.width, generator=torch.Generator().manual_seed(0))
    )
    past = found[: SIZES.heads // SIZES.kv_heads, -1]
    assert past.argmax(dim=1).tolist() == [POSITIONS - 2, POSITIONS - 3, POSITIONS - 4]


def test_the_other_heads_look_at_their_like(model: KelixLM) -> None:
    x = inputs()
    x[10] = x[-1]  # the same token, far away
    found = scores(model, x)[SIZES.heads // SIZES.kv_heads :, -1, :-1]
    assert found.argmax(dim=1).tolist() == [10] * len(found)


def test_what_a_head_sees_is_written_as_it_was_read(model: KelixLM) -> None:
    attention = attention_of(model)
    values = attention.qkv.weight.split(attention.sizes)[2].view(SIZES.kv_heads, -1, SIZES.width)
    x = torch.randn(200, SIZES.width, generator=torch.Generator().manual_seed(0))
    seen = (values @ x.t()).repeat_interleave(SIZES.heads // SIZES.kv_heads, dim=0)
    with torch.no_grad():
        written = attention.output(seen.flatten(0, 1).t())
    assert F.cosine_similarity(written, x).min() > 0.3  # random weights give 0 within 0.25


def test_the_head_names_what_it_is_given(model: KelixLM) -> None:
    with torch.no_grad():
        logits = model.embeddings / EMBEDDING_STD @ model.head.t()
    assert logits.argmax(dim=1).tolist() == list(range(len(logits)))


def test_the_seed_decides() -> None:
    config = language_config(SIZES)
    found = [new_language_model(config, "cpu", seed).head for seed in (0, 0, 1)]
    assert [torch.equal(a, b) for a, b in pairwise(found)] == [True, False]
