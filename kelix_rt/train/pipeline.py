"""The parts of kelix-tiny in their order: what each needs, and where it lies in the output folder.

text/         text tokenizer, chat template and image processor
autoencoder/  tokenizer/  language/  detokenizer/    checkpoints and logs of the stages
codes.safetensors, latents.safetensors               of the training pictures
kelix-tiny/   the finished checkpoint        evaluation/   what it can do
ablations/    variants of the tokenizer, on demand
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kelix_rt.checkpoint import resolve
from kelix_rt.config import KelixConfig
from kelix_rt.engine import Engine
from kelix_rt.errors import ConfigError
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.processing import ChatProcessor, ImageProcessor, PositionMarkers, TextTokenizer
from kelix_rt.train import autoencoder as autoencoder_part
from kelix_rt.train import detokenizer as detokenizer_part
from kelix_rt.train import language as language_part
from kelix_rt.train import tokenizer as tokenizer_part
from kelix_rt.train.ablations import ablate
from kelix_rt.train.chats import ChatBuilder
from kelix_rt.train.detokenizer_start import new_dit
from kelix_rt.train.evaluate import Amounts, evaluate
from kelix_rt.train.export import TrainedParts, export, own_centres, require_checkpoint_world
from kelix_rt.train.language_start import new_language_model
from kelix_rt.train.pictures import PictureCodes, encode_latents, encode_pictures
from kelix_rt.train.recipe import Recipe, dit_config, language_config, tokenizer_config
from kelix_rt.train.states import load_modules, write_whole
from kelix_rt.train.text_tokenizer import write_text_tokenizer
from kelix_rt.train.world_scene import WORLD_VERSION

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

NAME = "kelix-tiny"
STAGES = {
    "autoencoder": autoencoder_part.STAGES,
    "tokenizer": tokenizer_part.STAGES,
    "language": language_part.STAGES,
    "detokenizer": detokenizer_part.STAGES,
}


@dataclass
class Pipeline:
    """One run of a recipe in one output folder. Parts are trained or loaded when first needed."""

    recipe: Recipe
    out: Path
    device: torch.device

    def train(self, part: str, stages: Sequence[str] | None = None, **options: Any) -> None:
        """Trains stages of a part (None: all), each from the checkpoint of the one before.

        options: further arguments of `run_stage`. Raises ConfigError where an earlier part or stage
        is missing.
        """
        trainer: Any = getattr(self, f"_{part}_trainer")
        asked = STAGES[part] if stages is None else stages
        trainer.run(asked, **options)
        if STAGES[part][-1] in asked:
            self.encode(part)

    def encode(self, part: str) -> None:
        """Writes what later parts read of a finished one: codes or latents of the pictures."""
        if part == "tokenizer":
            self.codes()
        elif part == "autoencoder":
            self.latents()

    def train_all(self, **options: Any) -> None:
        """All stages of all parts; what is finished is only loaded."""
        for part in STAGES:
            self.train(part, **options)

    @property
    def checkpoint(self) -> Path:
        """Where the finished checkpoint lies."""
        return self.out / NAME

    def export(self) -> int:
        """Writes the finished checkpoint; its size in bytes. ConfigError for a missing part."""
        trainer = self._language_trainer
        load_modules(
            trainer.out / f"language-{language_part.STAGES[-1]}.pt", {"model": trainer.model}
        )
        dit = self._detokenizer_trainer.dit
        folder = self._detokenizer_trainer.out
        load_modules(folder / f"detokenizer-{detokenizer_part.STAGES[-1]}.pt", {"dit": dit})
        parts = TrainedParts(
            trainer.model,
            self.tokenizer,
            own_centres(self.tokenizer.config, self._tokenizer_trainer.quantizer.stored()),
            self.images,
            self.text_folder,
            dit,
            self.vae,
        )
        return export(parts, self.checkpoint, model_card(self.recipe))

    def evaluate(self, amounts: Amounts) -> dict[str, Any]:
        """Measures the finished checkpoint; raises ConfigError when it is of another world."""
        return evaluate_checkpoint(self.checkpoint, self.out / "evaluation", amounts, self.device)

    def ablate(self, pictures: int, **options: Any) -> dict[str, Any]:
        """Variants of the tokenizer, see `ablations.ablate`; needs the tokenizer's warm-up."""
        return ablate(self._tokenizer_trainer, pictures, self.out / "ablations", **options)

    @property
    def text_folder(self) -> Path:
        """Files of the text tokenizer; trained when they are not there."""
        self.write_text()
        return self.out / "text"

    def write_text(self) -> None:
        """Trains the text tokenizer unless it is there. ConfigError for one of another run."""
        folder = self.out / "text"
        own = {"world": WORLD_VERSION, **self.recipe.facts(seed=self.recipe.seed)}
        label, file = json.dumps(own, indent=2) + "\n", folder / "made_of.json"
        if not file.is_file():
            write_text_tokenizer(folder, self.recipe.sizes, self.recipe.seed)
            write_whole(file, label.encode())
        elif file.read_text(encoding="utf-8") != label:
            raise ConfigError(
                f"{folder} is of another seed, size or world (see {file.name}); use the same, or "
                "another output directory"
            )

    @cached_property
    def text(self) -> TextTokenizer:
        """The text tokenizer."""
        return TextTokenizer.from_pretrained(self.text_folder, vocab_size=self.recipe.sizes.vocab)

    @cached_property
    def images(self) -> ImageProcessor:
        """The image processor."""
        return ImageProcessor.from_pretrained(self.text_folder)

    @cached_property
    def config(self) -> KelixConfig:
        """The language model's config."""
        return language_config(self.recipe.sizes)

    @cached_property
    def chats(self) -> ChatBuilder:
        """Scenes to chats."""
        end = self.config.block_end
        markers = PositionMarkers(end + 1, end + 2, self.recipe.sizes.marker)
        processor = ChatProcessor(self.text, self.images, self.config.qwen_config, markers)
        return ChatBuilder(processor, self.config.qwen_config)

    @cached_property
    def vae(self) -> AutoencoderDC:
        """The trained autoencoder."""
        trainer = self._autoencoder_trainer
        path = trainer.out / f"autoencoder-{autoencoder_part.STAGES[-1]}.pt"
        load_modules(path, {"vae": trainer.vae})
        trainer.set_scale()  # it is part of the config, not of the weights
        return trainer.vae.eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> VisionTokenizer:
        """The trained visual tokenizer with its codebooks."""
        trainer = self._tokenizer_trainer
        path = trainer.out / f"tokenizer-{tokenizer_part.STAGES[-1]}.pt"
        load_modules(path, trainer.modules)
        with torch.no_grad():
            trainer.model.set_codebooks(trainer.quantizer.codebooks())
        return trainer.model.eval().requires_grad_(False)

    def codes(self) -> PictureCodes:
        """Codes of the training pictures by the trained tokenizer; made once, then read."""
        sizes = self.recipe.sizes
        return encode_pictures(
            self.tokenizer, self.images, self.recipe.pictures, sizes.side, sizes.other_sides,
            sizes.vocab, self.recipe.seed, self.out / "codes.safetensors",
        )  # fmt: skip

    def latents(self) -> torch.Tensor:
        """Latents of the training pictures by the trained autoencoder; made once, then read."""
        return encode_latents(
            self.vae, self.recipe.pictures, self.recipe.sizes.drawn_side, self.recipe.seed,
            self.out / "latents.safetensors",
        )  # fmt: skip

    @cached_property
    def _autoencoder_trainer(self) -> autoencoder_part.AutoencoderTrainer:
        return autoencoder_part.AutoencoderTrainer(
            self.recipe, self.out / "autoencoder", self.device
        )

    @cached_property
    def _tokenizer_trainer(self) -> tokenizer_part.TokenizerTrainer:
        config = tokenizer_config(self.recipe.sizes)
        return tokenizer_part.TokenizerTrainer(
            self.recipe, config, self.text, self.images, self.out / "tokenizer", self.device
        )

    def _new_language_model(self) -> KelixLM:
        return new_language_model(self.config, self.device, self.recipe.seed)

    @cached_property
    def _language_trainer(self) -> language_part.LanguageTrainer:
        return language_part.LanguageTrainer(
            self._new_language_model(), lambda: self.tokenizer, self.chats, cache(self.codes),
            self.recipe, self.out / "language",
        )  # fmt: skip

    @cached_property
    def _detokenizer_trainer(self) -> detokenizer_part.DetokenizerTrainer:
        model = self._new_language_model()
        dit = new_dit(dit_config(self.recipe.sizes), self.device, self.recipe.seed)
        return detokenizer_part.DetokenizerTrainer(
            dit, model.eval(), self.chats, self.codes(), self.latents(), self.vae, self.recipe,
            self.out / "language", self.out / "detokenizer",
        )  # fmt: skip


def evaluate_checkpoint(
    checkpoint: Path | str, out: Path, amounts: Amounts, device: torch.device
) -> dict[str, Any]:
    """Measures a checkpoint, named as `Engine.from_pretrained` takes it, on pictures of its own
    side. Raises ConfigError when it is of another version of the world."""
    folder = resolve(checkpoint)
    require_checkpoint_world(folder)
    engine = Engine.from_pretrained(folder, device=device)
    side = engine.config.tokenizer_config.vision_config.image_size
    return evaluate(engine, replace(amounts, side=side), out)


def model_card(recipe: Recipe) -> str:
    """README.md of the checkpoint: what it is, how it was made, what it is not."""
    sizes = recipe.sizes
    rows = [
        f"| {part} | {name} | {stage.steps} | {stage.batch} | {stage.lr:g} |"
        for part in STAGES
        for name, stage in getattr(recipe, part).items()
    ]
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: kelix_rt",
            "---",
            f"# {NAME}",
            "",
            "A very small Kelix: it sees and draws the synthetic world of `kelix_rt.train.world` "
            "(shapes, colours, counts, positions, short printed words) and nothing else. It has "
            "the layout, the code paths and the commands of the released model; it says nothing "
            "about that model's quality.",
            "",
            f"{sizes.books} sub-codebooks of {sizes.codes_per_book} codes, text vocabulary "
            f"{sizes.vocab}, width {sizes.width}, {sizes.layers} layers, pictures of {sizes.side} "
            f"pixels in ({sizes.tokens_per_side} x {sizes.tokens_per_side} codes) and "
            f"{sizes.drawn_side} pixels out. Weights are bfloat16.",
            "",
            f"Trained from nothing by the recipe of `kelix_rt.train`, seed {recipe.seed}, on "
            "pictures drawn by a program; no other data. The language model and the DiT saw "
            f"{recipe.pictures} of them. The stages are those of the Kelix report, with warm-ups "
            "in place of its pretrained vision transformer and language model. `lm_head`, a copy "
            "of the head that inference never reads, is left out. preprocessor_config.json names "
            "the position markers, which stand in prompts and drawings alike.",
            "",
            "| part | stage | steps | batch | peak rate |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
