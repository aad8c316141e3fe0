"""The trained quantizer: straight-through gradients, the VQ loss, codes as at inference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kelix_rt.config import TokenizerConfig
from kelix_rt.errors import ConfigError
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.testing import randn
from kelix_rt.train.quantizer import COMMITMENT, SimVQ, code_usage, fuse, normalise
from kelix_rt.train.recipe import Sizes, tokenizer_config
from kelix_rt.train.tokenizer import new_vision_tokenizer

SIZES = Sizes(
    books=2, codes_per_book=6, code_dim=4, width=16,
    vision_width=16, vision_layers=1, vision_heads=2, vision_ffn=16,
)  # fmt: skip


@pytest.fixture
def parts() -> tuple[VisionTokenizer, SimVQ]:
    config = tokenizer_config(SIZES)
    model, quantizer = new_vision_tokenizer(config, "cpu", 0), SimVQ(config)
    quantizer.start(randn(100, 16), model)
    return model, quantizer


def test_a_patch_that_is_a_centre_gets_its_code(parts: tuple[VisionTokenizer, SimVQ]) -> None:
    model, quantizer = parts
    for book in range(2):
        codes = quantizer(model.project(quantizer.centres[book]), model).codes
        assert codes[:, book].tolist() == list(range(6))


def test_forwards_the_codes_and_backwards_the_features(
    parts: tuple[VisionTokenizer, SimVQ],
) -> None:
    model, quantizer = parts
    z = randn(5, 2, 4).requires_grad_()
    found = quantizer(z, model)
    books = quantizer.codebooks()
    want = torch.stack([books[i, found.codes[:, i]] for i in range(2)], dim=1)
    torch.testing.assert_close(found.vectors, want)
    upstream = randn(5, 2, 4, seed=1)
    (got,) = torch.autograd.grad((found.vectors * upstream).sum(), z)
    (as_if,) = torch.autograd.grad((normalise(z, model) * upstream).sum(), z)
    torch.testing.assert_close(got, as_if)


def test_loss_moves_codes_and_features_towards_each_other(
    parts: tuple[VisionTokenizer, SimVQ],
) -> None:
    model, quantizer = parts
    z = randn(5, 2, 4).requires_grad_()
    found = quantizer(z, model)
    normed = normalise(z, model)
    distance = F.mse_loss(normed, found.vectors.detach())
    torch.testing.assert_close(found.loss, (1 + COMMITMENT) * distance)
    (by_loss,) = torch.autograd.grad(found.loss, z, retain_graph=True)
    (by_distance,) = torch.autograd.grad(distance, z)
    torch.testing.assert_close(by_loss, COMMITMENT * by_distance)
    found.loss.backward()
    assert quantizer.weight.grad is not None and quantizer.weight.grad.abs().sum() > 0
    assert not quantizer.centres.requires_grad


def test_codes_and_fusion_are_those_of_inference(parts: tuple[VisionTokenizer, SimVQ]) -> None:
    model, quantizer = parts
    z = randn(9, 2, 4)
    with torch.no_grad():
        found = quantizer(z, model)
        model.set_codebooks(quantizer.codebooks())
        assert torch.equal(model.quantize(z), found.codes)
        torch.testing.assert_close(fuse(found.vectors, model), model.embed(found.codes))


def test_usage_counts_codes_per_book() -> None:
    codes = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 0]])
    used, perplexity = code_usage(codes, 4)
    assert used.tolist() == [0.25, 1.0]
    torch.testing.assert_close(perplexity, torch.tensor([1.0, 4.0]))


def test_configs_without_a_block_per_book_are_refused() -> None:
    config: TokenizerConfig = tokenizer_config(SIZES)
    with pytest.raises(ConfigError, match="split_voc must equal n_q_tokens"):
        SimVQ(replace(config, split_voc=1))
    narrow = replace(config, init_embedding_dim=8)
    with pytest.raises(ConfigError, match="init_embedding_dim must be 16"):
        SimVQ(narrow).start(randn(100, 16), new_vision_tokenizer(narrow, "cpu", 0))


def test_twins_are_drawn_to_each_others_codes(parts: tuple[VisionTokenizer, SimVQ]) -> None:
    model, quantizer = parts
    z = randn(4, 2, 4).requires_grad_()
    found = quantizer(z, model)
    twins = torch.tensor([[0, 2], [3, 1]])
    swapped = found.vectors.detach()[[2, 3, 0, 1]]
    want = 2 * F.mse_loss(normalise(z, model), swapped)
    torch.testing.assert_close(found.twin_loss(twins), want)
    (got,) = torch.autograd.grad(found.twin_loss(twins[:1]), z)
    assert got[[0, 2]].abs().min() > 0 and not got[[1, 3]].any()
