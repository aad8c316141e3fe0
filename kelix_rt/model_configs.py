"""Configs of the language model's parts, as config.json writes them.

Field names and defaults equal the JSON of the released checkpoints; values that cannot run raise
ConfigError naming the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kelix_rt.schema import JsonConfig
from kelix_rt.tokenizer_config import TokenizerConfig

MAX_HEAD_DIM = 256  # paged_attention's


@dataclass(frozen=True)
class QwenConfig(JsonConfig):
    """The Qwen3 backbone over blocks. Norms use `norm_eps`, RoPE uses `rope_base`."""

    model_class: str = "UnifiedQwen3Model"
    vocab_size: int = 151936
    embed_dim: int = 4096
    num_layers: int = 32
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    attn_dropout: float = 0.0
    attention_function: str = "eager"
    q_proj_bias: bool = False
    k_proj_bias: bool = False
    v_proj_bias: bool = False
    attention_bias: bool = False
    intermediate_dim: int = 11008
    max_seq_len: int = 32768
    rope_base: float = 10000.0
    rope_impl: Any = None
    rope_theta: Any = None
    rope_scaling: Any = None
    use_sliding_window: Any = False
    sliding_window: Any = None
    norm_eps: float = 1e-6
    rms_norm_eps: Any = 1e-6
    q_norm: bool = True
    k_norm: bool = True
    eos_token_id: int | None = 151645
    use_multimodal_rope: bool = False
    mrope_section: Any = None
    pre_embedding_size: int | None = None
    pre_embedding_tokens: int | None = None
    image_token_id: int | None = None
    pad_token_id: int | None = None
    q_eos_token: int | None = None
    vision_start_token_id: int | None = 151652
    vision_end_token_id: int | None = 151653
    output_last_hidden_states_only: bool = False
    token_decoder_with_teacher_forcing: bool = True
    codebook_size: int = 8192
    n_q_tokens: int = 8
    skip_output_layer: bool = False

    def __post_init__(self) -> None:
        self.require_positive(
            "vocab_size embed_dim num_layers num_heads num_kv_heads head_dim "
            "intermediate_dim max_seq_len rope_base codebook_size n_q_tokens"
        )
        self.require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"be divisible by num_kv_heads {self.num_kv_heads}",
        )
        self.require(
            self.head_dim % 2 == 0 and self.head_dim <= MAX_HEAD_DIM,
            "head_dim",
            f"be even (RoPE) and at most {MAX_HEAD_DIM}",
        )
        self.require(
            self.codebook_size % self.n_q_tokens == 0,
            "codebook_size",
            f"be divisible by n_q_tokens {self.n_q_tokens}",
        )
        for name in ("tie_word_embeddings", "use_multimodal_rope", "skip_output_layer"):
            self.require(not getattr(self, name), name, "be false: inference has no such path")
        self.require(
            self.pre_embedding_size is None,
            "pre_embedding_size",
            "be null: the text table would be missing",
        )
        for name in (
            "eos_token_id",
            "image_token_id",
            "q_eos_token",
            "vision_start_token_id",
            "vision_end_token_id",
        ):
            value = getattr(self, name)
            if (
                value is not None
                and value == getattr(QwenConfig, name)
                and value >= self.vocab_size
            ):
                object.__setattr__(self, name, None)  # a larger vocabulary's id: it never occurs
                continue
            self.require(
                value is None or 0 <= value < self.vocab_size,
                name,
                f"be a text id below vocab_size {self.vocab_size}",
            )

    @property
    def codes_per_book(self) -> int:
        """K: ids of one sub-codebook."""
        return self.codebook_size // self.n_q_tokens

    @property
    def total_vocab(self) -> int:
        """Rows of the embedding table and of the head: text ids, then visual codes."""
        return self.vocab_size + self.codebook_size


@dataclass(frozen=True)
class TokenDecoderConfig(JsonConfig):
    """The Block Decoder: writes the N+1 ids of a block from one backbone state."""

    model_class: str = "UnifiedTokenDecoder"
    vocab_size: int = 8192
    max_pos_length: int = 65537
    max_length: int = 9
    d_model: int = 512
    eos_token: int = 151681
    nhead: int = 4
    num_layers: int = 1
    dim_feedforward: int = 1024
    use_gradient_checkpointing: bool = True
    input_dim: int | None = None
    reduce: bool = True
    attention_function: str = "eager"

    def __post_init__(self) -> None:
        self.require_positive("max_pos_length max_length d_model nhead num_layers dim_feedforward")
        self.require(
            self.d_model % self.nhead == 0, "d_model", f"be divisible by nhead {self.nhead}"
        )
        self.require(
            self.reduce, "reduce", "be true: a decoder without projections is not supported"
        )


@dataclass(frozen=True)
class KelixConfig(JsonConfig):
    """The whole language model: backbone, Block Decoder and visual tokenizer."""

    qwen_config: QwenConfig
    tokenizer_config: TokenizerConfig
    token_decoder_config: TokenDecoderConfig
    model_class: str = "KeyeARModel"

    def __post_init__(self) -> None:
        qwen, tokenizer, decoder = (
            self.qwen_config,
            self.tokenizer_config,
            self.token_decoder_config,
        )
        for name in ("n_q_tokens", "codebook_size"):
            self.require(
                getattr(tokenizer, name) == getattr(qwen, name),
                f"tokenizer_config.{name}",
                f"equal qwen_config.{name} {getattr(qwen, name)}",
            )
        self.require(
            tokenizer.has_disjoint_ids,
            "tokenizer_config.split_voc",
            "equal n_q_tokens: the id ranges of the sub-codebooks overlap otherwise",
        )
        slots = qwen.n_q_tokens
        self.require(
            decoder.max_length - 1 >= slots,
            "token_decoder_config.max_length",
            f"be at least n_q_tokens + 1 = {slots + 1}: a block would lack codes",
        )
        self.require(
            decoder.max_pos_length > slots,
            "token_decoder_config.max_pos_length",
            f"be at least n_q_tokens + 1 = {slots + 1}",
        )
        self.require(
            decoder.input_dim in (None, qwen.embed_dim),
            "token_decoder_config.input_dim",
            f"be null or qwen_config.embed_dim {qwen.embed_dim}",
        )
        self.require(
            qwen.q_eos_token in (None, decoder.eos_token),
            "token_decoder_config.eos_token",
            f"equal qwen_config.q_eos_token {qwen.q_eos_token}",
        )
        self.require(
            0 <= decoder.eos_token < qwen.vocab_size,
            "token_decoder_config.eos_token",
            f"be a text id below vocab_size {qwen.vocab_size}",
        )

    @property
    def block_end(self) -> int:
        """The id that ends a block and pads it (q_eos)."""
        return self.token_decoder_config.eos_token

    @property
    def marker_ids(self) -> tuple[int, int]:
        """The ids around the coordinates of a position marker: the two after block_end."""
        return self.block_end + 1, self.block_end + 2

    @property
    def num_codes(self) -> int:
        """N: visual codes of a block."""
        return self.qwen_config.n_q_tokens
