from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.train import autoencoder, detokenizer, language, tokenizer
from kelix_rt.train.autoencoder import new_autoencoder
from kelix_rt.train.chats import TASKS
from kelix_rt.train.export import MAX_BYTES
from kelix_rt.train.recipe import (
    CPU,
    GPU,
    PARTS,
    Recipe,
    Sizes,
    Stage,
    dit_config,
    language_config,
    tokenizer_config,
)


@pytest.mark.parametrize("recipe", [CPU, GPU])
def test_recipes_name_the_stages_and_tasks_there_are(recipe: Recipe) -> None:
    assert tuple(recipe.language) == language.STAGES
    assert tuple(recipe.detokenizer) == detokenizer.STAGES
    assert tuple(recipe.tokenizer) == tokenizer.STAGES
    assert tuple(recipe.autoencoder) == autoencoder.STAGES
    for part in PARTS:
        for stage in getattr(recipe, part).values():
            assert set(stage.tasks) <= set(TASKS)
            assert 0 < stage.warmup < stage.steps


def test_special_ids_lie_as_in_the_release() -> None:
    qwen = language_config(Sizes()).qwen_config
    distances = {"pad": 151643, "eos": 151645, "vision_start": 151652, "vision_end": 151653,
                 "image": 151655}  # fmt: skip
    for name, released in distances.items():
        assert 151936 - released == qwen.vocab_size - getattr(qwen, f"{name}_token_id")
    assert qwen.q_eos_token is not None
    assert qwen.vocab_size - qwen.q_eos_token == 151936 - 151681


def test_the_models_fit_the_largest_checkpoint() -> None:
    sizes = Sizes()
    with torch.device("meta"):
        models = (
            KelixLM(language_config(sizes)),
            VisionTokenizer(tokenizer_config(sizes)),
            KelixDiT(dit_config(sizes)),
        )
    numbers = sum(p.numel() for model in (*models, new_autoencoder(sizes, "cpu", 0))
                  for p in model.parameters())  # fmt: skip
    centres = sizes.codebook * sizes.width
    projections = sizes.books * sizes.code_dim * (sizes.width + 3)
    text_files = 150_000
    assert 2 * (numbers + centres + projections) + text_files < MAX_BYTES


def test_a_condition_holds_a_whole_drawing() -> None:
    assert Sizes().condition_rows == 2 + 8 * (8 + 3)
    assert Sizes().condition_rows <= dit_config(Sizes()).model_max_length
    assert replace(Sizes(), side=168).tokens_per_side == 6


def test_budgets_scale_steps() -> None:
    assert Stage(100, 1.0, 50, 8).scaled(0.1) == Stage(10, 1.0, 2, 8)
    assert Stage(100, 1.0, 50, 8).scaled(0.001) == Stage(1, 1.0, 1, 8)
    half, double = CPU.scaled(0.5), CPU.scaled(2.0)
    assert half.pictures == CPU.pictures // 2 and double.pictures == CPU.pictures
    assert half.language["2.2"].steps == CPU.language["2.2"].steps // 2
    assert double.detokenizer["1"].steps == 2 * CPU.detokenizer["1"].steps
    assert CPU.seeded(5).seed == 5
