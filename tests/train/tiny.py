"""The smallest parts that can be trained, made from the golden checkpoint `llm/tiny_a`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from kelix_rt.config import KelixConfig, read_config
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.processing import ChatProcessor, ImageProcessor, PositionMarkers, TextTokenizer
from kelix_rt.train.chats import ChatBuilder
from kelix_rt.train.language import LanguageTrainer
from kelix_rt.train.language_start import new_language_model
from kelix_rt.train.pictures import PictureCodes, encode_pictures
from kelix_rt.train.recipe import CPU, Recipe, Sizes, Stage

CHECKPOINT = Path(__file__).parents[1] / "golden" / "llm" / "tiny_a"
SIDE, OTHER = 56, 84
STAGE = Stage(2, 3e-3, 1, 40, {"questions": 1.0, "draw": 1.0})
RECIPE: Recipe = replace(
    CPU,
    sizes=Sizes(side=SIDE, other_sides=(OTHER,)),
    pictures=3,
    language={
        "warmup": replace(STAGE, tasks={"told": 1.0, "text": 1.0}),
        "1": replace(STAGE, tasks={"pair": 1.0}),
        "2.1": replace(STAGE, tasks={"pair": 1.0}),
        "2.2": STAGE,
        "3": STAGE,
        "4": replace(STAGE, tasks={"one_question": 1.0, "draw": 1.0}),
    },
)


def config() -> KelixConfig:
    found = read_config(CHECKPOINT)
    assert isinstance(found, KelixConfig)
    return found


def model(seed: int = 0) -> KelixLM:
    return new_language_model(config(), "cpu", seed)


def tokenizer() -> VisionTokenizer:
    """The golden tokenizer; up-projectors, which it may lack, are random."""
    loaded = VisionTokenizer.from_pretrained(CHECKPOINT, "visual_tokenizer.")
    if loaded.up_projectors is None:
        own, generator = loaded.config, torch.Generator().manual_seed(0)
        shape = (own.n_q_tokens, own.output_dim, own.code_dim)
        loaded.up_projectors = torch.nn.Parameter(torch.randn(shape, generator=generator))
    return loaded


def images() -> ImageProcessor:
    return ImageProcessor.from_pretrained(CHECKPOINT)


def chats() -> ChatBuilder:
    qwen = config().qwen_config
    text = TextTokenizer.from_pretrained(CHECKPOINT, vocab_size=qwen.vocab_size)
    end = config().block_end
    markers = PositionMarkers(end + 1, end + 2, "{row}")
    return ChatBuilder(ChatProcessor(text, images(), qwen, markers), qwen)


def pictures(folder: Path) -> PictureCodes:
    return encode_pictures(
        tokenizer(),
        images(),
        RECIPE.pictures,
        SIDE,
        (OTHER,),
        config().qwen_config.vocab_size,
        RECIPE.seed,
        folder / "codes.safetensors",
    )


def trainer(folder: Path, seed: int = 0) -> LanguageTrainer:
    return LanguageTrainer(
        model(seed), tokenizer, chats(), cache(partial(pictures, folder)), RECIPE,
        folder / "language",
    )  # fmt: skip


def replaced(**parts: Any) -> Recipe:
    """The tiny recipe with other stages."""
    return replace(RECIPE, **parts)
