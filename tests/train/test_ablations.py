"""Variants of the tokenizer: which there are, and that they differ in what they say they do."""

from __future__ import annotations

from dataclasses import replace

import torch

from kelix_rt.train.ablations import SharedCodebook, short_stages, variants
from kelix_rt.train.recipe import CPU, Sizes, tokenizer_config


def test_variants_halve_n_and_keep_the_codes_of_a_book() -> None:
    found = variants(8)
    assert [variant.books for variant in found] == [1, 2, 4, 8, 8, 8]
    for variant in found:
        config = variant.config(CPU)
        assert config.codes_per_book == CPU.sizes.codes_per_book
        assert config.fusion_type == ("mean" if "mean" in variant.name else "sum")
    assert [variant.shared for variant in found] == [False] * 5 + [True]


def test_a_shared_codebook_is_one() -> None:
    quantizer = SharedCodebook(tokenizer_config(Sizes(books=4, codes_per_book=8)))
    torch.nn.init.normal_(quantizer.centres)
    torch.nn.init.normal_(quantizer.weight)
    books = quantizer.codebooks()
    assert books.shape[0] == 4 and books[0].std() > 0
    assert all(torch.equal(book, books[0]) for book in books)


def test_a_short_recipe_shortens_the_variants_too() -> None:
    short = replace(CPU, tokenizer={"2": replace(CPU.tokenizer["2"], steps=3)})
    assert {stage.steps for stage in short_stages(short).values()} == {3}
