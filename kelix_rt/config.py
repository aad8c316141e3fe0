"""Model configs as the checkpoints write them, and the engine's own options.

Field names and defaults of the model configs equal the JSON of the released checkpoints, so that
`from_json` is a plain reading with checks: unknown fields, wrong types and combinations that
cannot run raise `ConfigError` naming the field. No torch here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kelix_rt.errors import ConfigError
from kelix_rt.model_configs import KelixConfig, QwenConfig, TokenDecoderConfig
from kelix_rt.schema import JsonConfig
from kelix_rt.tokenizer_config import TokenizerConfig, VisionConfig

__all__ = [
    "EngineConfig",
    "KelixConfig",
    "ModelConfig",
    "Quantization",
    "QwenConfig",
    "SanaConfig",
    "TokenDecoderConfig",
    "TokenizerConfig",
    "VisionConfig",
    "read_config",
]


Quantization: TypeAlias = Literal["int8"] | None


MAX_LINEAR_HEAD = 256  # relu_linear_attention's


@dataclass(frozen=True)
class SanaConfig(JsonConfig):
    """The image de-tokenizer: a linear-attention diffusion transformer (SANA, Xie et al. 2024)."""

    model_class: str = "SanaModel"
    input_size: int = 32
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 2240
    depth: int = 20
    num_heads: int = 20
    mlp_ratio: float = 2.5
    caption_channels: int = 2304
    model_max_length: int = 300
    attn_type: Literal["flash", "linear"] = "linear"
    cross_attn_type: str = "flash"
    linear_head_dim: int = 32
    qk_norm: bool = False
    cross_norm: bool = False
    use_cross_attn_rope: bool = False
    use_position_scale: bool = False
    cross_attn_x_norm: bool = False
    ffn_type: Literal["mlp", "glumbconv"] = "glumbconv"
    mlp_acts: tuple[str | None, ...] = ("silu", "silu", None)
    pred_sigma: bool = False
    learn_sigma: bool = False
    use_pe: bool = False
    pe_interpolation: float = 1.0
    y_norm: bool = True
    y_norm_scale_factor: float = 0.01
    norm_eps: float = 1e-5
    class_dropout_prob: float = 0.1
    drop_path: float = 0.0
    vae_type: str = "AutoencoderDC"
    vae_pretrained: str = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    vae_downsample_rate: int = 32
    text_encoder_name: str = "google/gemma-2-2b-it"
    y_embedding_init_method: str = "randn"
    use_connector: bool = False
    connector_channels: int | None = None

    def __post_init__(self) -> None:
        self.require_positive(
            "input_size patch_size in_channels hidden_size depth num_heads mlp_ratio "
            "caption_channels model_max_length linear_head_dim pe_interpolation "
            "vae_downsample_rate"
        )
        width, head = self.hidden_size, self.linear_head_dim
        self.require(width % self.num_heads == 0, "num_heads", f"divide hidden_size {width}")
        if self.attn_type == "linear":
            self.require(width % head == 0, "linear_head_dim", f"divide hidden_size {width}")
            self.require(
                head <= MAX_LINEAR_HEAD, "linear_head_dim", f"be at most {MAX_LINEAR_HEAD}"
            )
        self.require(len(self.mlp_acts) == 3, "mlp_acts", "have 3 entries")
        if self.use_cross_attn_rope:
            self.require(
                width // self.num_heads % 4 == 0,
                "num_heads",
                "give a head size divisible by 4 with use_cross_attn_rope",
            )
        if self.use_pe:
            self.require(width % 4 == 0, "hidden_size", "be divisible by 4 with use_pe")
        if self.use_connector:
            channels = self.connector_channels
            self.require(bool(channels), "connector_channels", "be set with use_connector")


@dataclass(frozen=True)
class EngineConfig(JsonConfig):
    """Options of the engine: capacities, caching and the rules of generation.

    max_batch: requests in flight. page_size: positions of a KV page. num_pages: KV pages, None =
    as many as `kv_memory_fraction` of the memory left after the weights holds. kv_dtype: what the
    cache holds: "auto" the model's dtype, "fp8" float8_e4m3fn, which makes a page of bfloat16 half
    as large and rounds keys and values (docs/kernels/attention.md). max_model_len:
    longest prompt plus answer in blocks, None = the model's. max_step_tokens: prompt positions
    computed per step (prefill chunk). prefix_cache: share pages of equal prefixes.
    image_cache_bytes: main memory for the codes of images seen before, 0 = none. verify_head:
    compute the full head too and count how often it leaves the admissible ids. position_markers:
    coordinates in front of every row of a prompt's images, such as "{row},{cols}", between the two
    ids that follow the end-of-block id; None = what the checkpoint's preprocessor_config.json
    names, "" = no markers. speculate_markers: guess the next marker inside a generated image and
    let the model check it in one step; changes no output. Off with verify_head, which counts what
    was generated. seed: base of the requests' seeds.
    trust_remote_code: allow the checkpoint's own tokenizer code. allow_files: False refuses local
    paths as images of messages, for those that come from strangers. drawing: False leaves the image
    DiT and its autoencoder out. max_condition_length: blocks an image is drawn from.
    max_drawn_pixels: of one drawing. condition_on_special_tokens: draw from the states of
    vision_start, markers and vision_end too, as the DiT was trained, or else of the codes alone.
    codes_mode: "reference" repeats the bfloat16 roundings of the release, whose language model was
    trained on the codes that they give; "exact" leaves them out. Equal in float32.
    cuda_graphs: record decode and denoise steps at start-up and launch each as one CUDA graph;
    has no effect without a GPU. overlap: launch a block step before the blocks of the one in front
    are read, where they cannot change its plan, so the host works while the GPU does; changes no
    output. Has no effect without a GPU, and none with verify_head. quantization:
    "int8" keeps the matrices of the language model's layers and its head as int8 with a float32
    scale per row, whatever the dtype; None keeps them in it.
    """

    max_batch: int = 32
    page_size: int = 16
    num_pages: int | None = None
    kv_memory_fraction: float = 0.8
    kv_dtype: Literal["auto", "fp8"] = "auto"
    max_model_len: int | None = None
    max_step_tokens: int = 512
    prefix_cache: bool = True
    image_cache_bytes: int = 64 << 20
    verify_head: bool = False
    position_markers: str | None = None
    speculate_markers: bool = True
    seed: int = 0
    trust_remote_code: bool = False
    allow_files: bool = True
    drawing: bool = True
    max_condition_length: int = 720
    max_drawn_pixels: int = 2048 * 2048
    condition_on_special_tokens: bool = True
    codes_mode: Literal["reference", "exact"] = "reference"
    cuda_graphs: bool = True
    overlap: bool = True
    quantization: Quantization = None

    def __post_init__(self) -> None:
        self.require_positive(
            "max_batch page_size max_step_tokens max_condition_length max_drawn_pixels"
        )
        size = self.image_cache_bytes
        self.require(size >= 0, "image_cache_bytes", "be 0 or more")
        for name in ("num_pages", "max_model_len"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "be None or positive")
        fraction = self.kv_memory_fraction
        self.require(0 < fraction <= 1, "kv_memory_fraction", "be above 0 and at most 1")
        choices = {
            "kv_dtype": ("auto", "fp8"),
            "codes_mode": ("reference", "exact"),
            "quantization": (None, "int8"),
        }
        for name, values in choices.items():
            self.require(getattr(self, name) in values, name, f"be one of {values}")

    def on_device(self, kind: str) -> EngineConfig:
        """The same without what a device of this kind ("cuda", "cpu") does not have."""
        return self if kind == "cuda" else replace(self, cuda_graphs=False, overlap=False)


ModelConfig = KelixConfig | TokenizerConfig | SanaConfig | dict[str, Any]
# Those of diffusers' AutoencoderDC, for what the runtime reads itself.
_AUTOENCODER_DEFAULTS: dict[str, Any] = {
    "latent_channels": 32,
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
}
_CLASSES: dict[str, type[KelixConfig | TokenizerConfig | SanaConfig]] = {
    "KeyeARConfig": KelixConfig,
    "KeyeTokenizerConfig": TokenizerConfig,
    "SanaConfig": SanaConfig,
}


def read_config(path: str | Path) -> ModelConfig:
    """Reads `config.json` (or a directory that holds it); its `__class__` picks the config class.

    Diffusers configs (`_class_name`, the VAE) come back as the dict they are, with diffusers' own
    defaults of what an old one lacks and is read here. Raises ConfigError.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"read_config: {file} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"read_config: {file} must hold a JSON object")
    if "_class_name" in data:
        return {**_AUTOENCODER_DEFAULTS, **data}
    name = data.get("__class__")
    if name not in _CLASSES:
        known = ", ".join([*_CLASSES, "or a diffusers _class_name"])
        raise ConfigError(f"read_config: __class__ in {file} must be one of {known}, got {name!r}")
    try:
        return _CLASSES[name].from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
