"""Config of the visual tokenizer, as config.json writes it.

Field names and defaults equal the JSON of the released checkpoints; values that cannot run raise
ConfigError naming the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kelix_rt.schema import JsonConfig


@dataclass(frozen=True)
class VisionConfig(JsonConfig):
    """The packed vision transformer of the tokenizer (NaViT)."""

    model_class: str = "KeyeVisionModel"
    image_size: int = 384
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 4304
    hidden_act: str = "silu"
    max_seq_len: int = 4096
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    has_learnable_position_embedding: bool = True
    use_qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_function: str = "flash_attention_2"
    output_attentions: bool = False
    output_hidden_states: bool = False

    def __post_init__(self) -> None:
        self.require_positive(
            "patch_size num_channels hidden_size num_attention_heads intermediate_size rope_theta"
        )
        self.require(self.num_hidden_layers >= 0, "num_hidden_layers", "not be negative")
        self.require(
            self.image_size >= self.patch_size,
            "image_size",
            f"be at least patch_size {self.patch_size}",
        )
        heads = self.num_attention_heads
        self.require(
            self.hidden_size % heads == 0,
            "hidden_size",
            f"be divisible by num_attention_heads {heads}",
        )
        self.require(
            self.head_dim % 4 == 0,
            "hidden_size",
            f"give a head size divisible by 4 (2-D RoPE) with {heads} heads",
        )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Side of the square table of learned positions, in patches."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TokenizerConfig(JsonConfig):
    """Image -> parallel VQ codes; `codebook_size` counts the codes of all sub-codebooks."""

    vision_config: VisionConfig
    model_class: str = "KeyeImageTokenizer"
    codebook_size: int = 8192
    embedding_dim: int = 128
    init_embedding_dim: int = 4096
    llm_hidden_size: int = 4096
    n_q_tokens: int = 8
    split_dim: bool = False
    split_voc: int = 1
    add_voc_reducer: bool = False
    vq_sampling_mode: str = "argmin"
    vq_temperature: float = 1.0
    vq_temperature_decay: float = 0.999
    vq_min_temperature: float = 0.1
    pre_llm_align: bool = False
    output_dim: int = 1024
    fusion_type: Literal["mean", "sum"] = "sum"

    def __post_init__(self) -> None:
        self.require_positive(
            "codebook_size embedding_dim init_embedding_dim llm_hidden_size n_q_tokens output_dim"
        )
        self.require(
            self.vq_sampling_mode == "argmin",
            "vq_sampling_mode",
            "be 'argmin' (other modes only train)",
        )
        self.require(
            self.split_voc in (0, 1, self.n_q_tokens),
            "split_voc",
            f"be n_q_tokens ({self.n_q_tokens}), or 0 or 1 for undivided codebooks: otherwise "
            "the id ranges of the sub-codebooks overlap",
        )
        self.require(
            self.codes_per_book > 0, "codebook_size", f"be at least split_voc {self.split_voc}"
        )
        if self.split_dim:
            self.require(
                self.embedding_dim % self.n_q_tokens == 0,
                "embedding_dim",
                f"be divisible by n_q_tokens {self.n_q_tokens} with split_dim",
            )

    @property
    def codes_per_book(self) -> int:
        """K: number of codes one sub-codebook chooses from."""
        return self.codebook_size // max(self.split_voc, 1)

    @property
    def code_dim(self) -> int:
        """Channels of one code."""
        return self.embedding_dim // self.n_q_tokens if self.split_dim else self.embedding_dim

    @property
    def has_disjoint_ids(self) -> bool:
        """True when the id ranges of the sub-codebooks do not overlap (needed for global ids)."""
        return self.codes_per_book * self.n_q_tokens <= self.codebook_size
