"""All sizes, steps and rates of kelix-tiny in one place, and how they change with the budget.

The stages are those of the Kelix report, with a warm-up in front of two parts: the report starts
from a pretrained vision transformer and a pretrained Qwen3, and neither exists at this size. The
autoencoder's decoder has a stage of its own, and the DiT's loss weighs places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kelix_rt.config import (
    KelixConfig,
    QwenConfig,
    SanaConfig,
    TokenDecoderConfig,
    TokenizerConfig,
    VisionConfig,
)

# How many of the first text ids below vocab_size the special tokens take, as in the release.
SPECIAL_TOKENS = 293


@dataclass(frozen=True)
class Sizes:
    """Shapes of the models. Lengths of sides are in pixels.

    side: of pictures the model sees and writes codes for; other_sides: further sides it is shown.
    drawn_side: of pictures that leave the autoencoder. marker: what stands between the two marker
    ids in front of a row of image tokens.
    """

    vocab: int = 1024
    books: int = 8
    codes_per_book: int = 128
    code_dim: int = 32
    patch: int = 14
    side: int = 224
    other_sides: tuple[int, ...] = (168, 196)
    vision_width: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    vision_ffn: int = 384
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 512
    max_positions: int = 1024
    block_width: int = 128
    block_heads: int = 4
    block_ffn: int = 256
    marker: str = "{row}"
    latent_channels: int = 32
    latent_rate: int = 32
    drawn_side: int = 256
    dit_width: int = 192
    dit_layers: int = 6
    dit_head_dim: int = 32
    caption_width: int = 192

    @property
    def tokens_per_side(self) -> int:
        """Rows and columns of codes of one picture."""
        return self.side // (2 * self.patch)

    @property
    def condition_rows(self) -> int:
        """Positions from vision_start to vision_end: two, the markers, and the codes."""
        return 2 + self.tokens_per_side * (self.tokens_per_side + 3)

    @property
    def codebook(self) -> int:
        """Codes of all sub-codebooks."""
        return self.books * self.codes_per_book


@dataclass(frozen=True)
class Stage:
    """One stage of one part: how long, how fast, on what.

    tasks: how often each kind of sample is drawn (see `kelix_rt.train.chats.TASKS`).
    batch: samples (language model: positions).
    """

    steps: int
    lr: float
    warmup: int
    batch: int
    tasks: Mapping[str, float] = field(default_factory=dict)
    lr_floor: float = 0.1

    def scaled(self, budget: float) -> Stage:
        """The same stage in `budget` times the steps, at least one."""
        steps = max(1, round(self.steps * budget))
        return replace(self, steps=steps, warmup=min(self.warmup, max(1, steps // 5)))


@dataclass(frozen=True)
class Recipe:
    """The whole pipeline. pictures: train scenes that get codes and latents."""

    sizes: Sizes = Sizes()
    pictures: int = 12_000
    seed: int = 0
    autoencoder: Mapping[str, Stage] = field(default_factory=dict)
    tokenizer: Mapping[str, Stage] = field(default_factory=dict)
    language: Mapping[str, Stage] = field(default_factory=dict)
    detokenizer: Mapping[str, Stage] = field(default_factory=dict)

    def scaled(self, budget: float) -> Recipe:
        """Every stage with `budget` times its steps; fewer pictures below 1."""
        parts: dict[str, Any] = {
            name: {key: stage.scaled(budget) for key, stage in getattr(self, name).items()}
            for name in PARTS
        }
        pictures = max(16, round(self.pictures * min(1.0, budget)))
        return replace(self, pictures=pictures, **parts)

    def seeded(self, seed: int) -> Recipe:
        """The same recipe with another seed."""
        return replace(self, seed=seed)

    def facts(self, **own: Any) -> dict[str, Any]:
        """What a checkpoint depends on besides its steps and rates, for `run_stage`."""
        return {"sizes": asdict(self.sizes), **own}


PARTS = ("autoencoder", "tokenizer", "language", "detokenizer")


def _language(batch: int, share: float, rate: float) -> dict[str, Stage]:
    """Stages of the language model. share: of the steps of the CPU recipe."""

    def stage(steps: int, lr: float, tasks: Mapping[str, float], **options: Any) -> Stage:
        return Stage(round(steps * share), lr * rate, 50, batch, tasks, **options)

    looked = {"shown": 4.0, "strange": 1.0, "pair": 1.0, "told": 0.7}
    asked = {"shown": 2.0, "shown relations": 0.8, "strange": 0.8}
    asked |= {"questions": 2.0, "strange questions": 0.8, "inventory": 0.7}
    mixed = {"text": 0.4, "told relations": 0.5, "caption": 0.4, "draw": 3.5, **asked}
    related = {"told relations": 1.0, "shown relations": 1.5, "relation questions": 2.0}
    related |= {"strange relations": 2.0}
    drawn = {"draw": 7.0, "draw exactly": 4.0, "draw odd": 7.0}
    late = mixed | {"shown": 1.0, "questions": 2.5, "inventory": 0.3} | related | drawn
    single = {"text": 0.5, "caption": 1.0, "one_question": 4.0, "draw": 4.0}
    return {
        "warmup": stage(1500, 1e-3, {"told": 3.0, "text": 0.5}, lr_floor=0.3),
        "1": stage(300, 1e-3, {"shown": 2.0, "pair": 1.0}, lr_floor=0.3),
        "2.1": stage(1200, 1e-3, looked, lr_floor=0.5),
        "2.2": stage(9500, 8e-4, mixed, lr_floor=0.4),
        "3": stage(28000, 8e-4, late, lr_floor=0.03),
        "4": stage(500, 5e-5, single),
    }


# Estimated: under three hours on two fast CPU cores, under five on slow ones (docs/kelix-tiny.md).
CPU = Recipe(
    autoencoder={
        "1": Stage(6000, 1e-3, 100, 8, lr_floor=0.02),
        "2": Stage(2500, 5e-4, 100, 8, lr_floor=0.02),
    },
    tokenizer={
        "warmup": Stage(3500, 2e-3, 100, 24, lr_floor=0.03),
        "1": Stage(300, 1e-3, 30, 6, lr_floor=0.3),
        "2": Stage(2200, 7e-4, 50, 6, lr_floor=0.2),
        "3": Stage(1400, 5e-4, 50, 6, lr_floor=0.02),
    },
    language=_language(batch=512, share=1.0, rate=1.0),
    detokenizer={
        "1": Stage(17000, 1e-3, 100, 16, lr_floor=0.4),
        "2": Stage(6000, 8e-4, 50, 16, lr_floor=0.02),
    },
)

# For one H100: larger batches, the same stages. It has not been run yet.
GPU = replace(
    CPU,
    pictures=30_000,
    autoencoder={
        "1": Stage(5000, 1e-3, 100, 64, lr_floor=0.02),
        "2": Stage(1500, 5e-4, 100, 64, lr_floor=0.02),
    },
    tokenizer={
        "warmup": Stage(3500, 2e-3, 100, 96, lr_floor=0.03),
        "1": Stage(300, 1e-3, 30, 32, lr_floor=0.3),
        "2": Stage(2500, 7e-4, 50, 32, lr_floor=0.2),
        "3": Stage(1000, 5e-4, 50, 32, lr_floor=0.02),
    },
    language=_language(batch=4096, share=0.4, rate=1.5),
    detokenizer={
        "1": Stage(4500, 2e-3, 100, 128, lr_floor=0.4),
        "2": Stage(2000, 1.6e-3, 50, 128, lr_floor=0.02),
    },
)


def tokenizer_config(sizes: Sizes) -> TokenizerConfig:
    """The visual tokenizer's config."""
    vision = VisionConfig(
        image_size=sizes.side,
        patch_size=sizes.patch,
        hidden_size=sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        intermediate_size=sizes.vision_ffn,
        attention_function="eager",
    )
    return TokenizerConfig(
        vision_config=vision,
        codebook_size=sizes.codebook,
        embedding_dim=sizes.code_dim,
        init_embedding_dim=sizes.width,
        llm_hidden_size=sizes.width,
        n_q_tokens=sizes.books,
        split_voc=sizes.books,
        output_dim=sizes.width,
    )


def language_config(sizes: Sizes) -> KelixConfig:
    """The language model's config; special tokens keep the release's distances to vocab_size."""
    special = sizes.vocab - SPECIAL_TOKENS
    qwen = QwenConfig(
        vocab_size=sizes.vocab,
        embed_dim=sizes.width,
        num_layers=sizes.layers,
        tie_word_embeddings=False,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope_base=1e4,
        q_proj_bias=True,
        k_proj_bias=True,
        intermediate_dim=sizes.ffn,
        max_seq_len=sizes.max_positions,
        pad_token_id=special,
        eos_token_id=special + 2,
        vision_start_token_id=special + 9,
        vision_end_token_id=special + 10,
        image_token_id=special + 12,
        q_eos_token=special + 38,
        codebook_size=sizes.codebook,
        n_q_tokens=sizes.books,
    )
    slots = sizes.books + 1
    decoder = TokenDecoderConfig(
        vocab_size=sizes.codebook,
        max_pos_length=slots,
        max_length=slots + 1,
        d_model=sizes.block_width,
        eos_token=special + 38,
        nhead=sizes.block_heads,
        dim_feedforward=sizes.block_ffn,
        input_dim=sizes.width,
    )
    return KelixConfig(qwen, tokenizer_config(sizes), decoder)


def dit_config(sizes: Sizes) -> SanaConfig:
    """The image DiT's config: the options of the release, and a table of places, because a short
    training does not find out from the padding of the convolutions where a token lies."""
    return SanaConfig(
        input_size=sizes.drawn_side // sizes.latent_rate,
        in_channels=sizes.latent_channels,
        hidden_size=sizes.dit_width,
        depth=sizes.dit_layers,
        num_heads=sizes.dit_width // sizes.dit_head_dim,
        linear_head_dim=sizes.dit_head_dim,
        caption_channels=sizes.caption_width,
        model_max_length=sizes.condition_rows,
        qk_norm=True,
        cross_norm=True,
        y_norm_scale_factor=1.0,
        vae_downsample_rate=sizes.latent_rate,
        use_pe=True,
        use_connector=True,
        connector_channels=sizes.width,
    )
