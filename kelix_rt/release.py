"""An engine of the released size with random weights, made on the device: for timing, not for use.

Head rows of text ids are almost zero, so that a drawing's blocks are visual ones, as trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kelix_rt.config import (
    EngineConfig,
    KelixConfig,
    QwenConfig,
    SanaConfig,
    TokenDecoderConfig,
)
from kelix_rt.devices import choose_device, choose_dtype
from kelix_rt.engine import Engine
from kelix_rt.errors import CapacityError, ConfigError
from kelix_rt.loading import assemble
from kelix_rt.measure import Workload
from kelix_rt.memory import available_bytes, cache_dtype, kv_bytes_per_block
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vae import Autoencoder
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.request import Prompt, RenderParams, SamplingParams
from kelix_rt.stages.render import RenderStage
from kelix_rt.tokenizer_config import TokenizerConfig, VisionConfig
from kelix_rt.workspace import language_workspaces

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

BLOCKS = 442  # vision_start to vision_end of an image of 324 visual blocks with its markers
ANSWER = 64


def _released_kelix() -> KelixConfig:
    qwen = QwenConfig(
        num_layers=36,
        tie_word_embeddings=False,
        num_kv_heads=8,
        intermediate_dim=12288,
        rope_base=1e6,
        image_token_id=151655,
        q_eos_token=151681,
        codebook_size=65536,
    )
    decoder = TokenDecoderConfig(max_pos_length=16, max_length=10, input_dim=4096)
    vision = VisionConfig(hidden_act="gelu_pytorch_tanh")
    tokenizer = TokenizerConfig(vision, codebook_size=65536, split_voc=8)
    return KelixConfig(qwen_config=qwen, tokenizer_config=tokenizer, token_decoder_config=decoder)


def _released_dit() -> SanaConfig:
    return SanaConfig(
        qk_norm=True,
        cross_norm=True,
        model_max_length=720,
        use_connector=True,
        connector_channels=4096,
    )


def _released_vae() -> dict[str, Any]:
    return {
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
        "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
        "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
        "upsample_block_type": "interpolate",
        "decoder_conv_act_fn": "relu",
        "scaling_factor": 0.41407,
    }


@dataclass(frozen=True)
class Sizes:
    """Configs of all parts; the defaults are the released ones."""

    kelix: KelixConfig = field(default_factory=_released_kelix)
    dit: SanaConfig = field(default_factory=_released_dit)
    vae: dict[str, Any] = field(default_factory=_released_vae)


def release_engine(
    device: str = "auto", dtype: str = "auto", options: EngineConfig | None = None
) -> Engine:
    """The released size on a GPU, in bfloat16 unless said.

    Raises ConfigError on a CPU, where a picture would take hours, and CapacityError when the
    device's free memory does not hold it.
    """
    target = choose_device(device)
    if target.type != "cuda":
        raise ConfigError(
            "bench: --config release needs an NVIDIA GPU: on a CPU the released size would take "
            "hours; leave --config out to time a checkpoint"
        )
    return random_engine(Sizes(), target, choose_dtype(dtype) or torch.bfloat16, options)


def random_engine(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, options: EngineConfig | None = None
) -> Engine:
    """An engine of these sizes. Raises CapacityError before anything is allocated.

    int8 weights are made of floating ones, so at the start the memory has to hold those.
    """
    from diffusers import AutoencoderDC

    options = options or EngineConfig()
    with torch.device("meta"):
        language = KelixLM(sizes.kelix)
        tokenizer = VisionTokenizer(sizes.kelix.tokenizer_config)
        vae: AutoencoderDC = AutoencoderDC.from_config(sizes.vae)
        del vae.encoder
    dit = KelixDiT(sizes.dit)
    parts: dict[str, nn.Module] = {
        "language model": language,
        "vision tokenizer": tokenizer,
        "image DiT": dit,
        "autoencoder": vae,
    }
    _require_memory(parts, sizes.kelix, options, device, dtype)
    for seed, part in enumerate(parts.values()):
        _fill(part, device, dtype, seed)
    with torch.no_grad():
        language.head[: sizes.kelix.qwen_config.vocab_size] *= 1e-3
        shape = tokenizer.codebooks.shape
        tokenizer.set_codebooks(torch.randn(shape, device=device, dtype=dtype))
    if options.quantization == "int8":
        language.quantize()
    language.prepare()
    language.visual_tokenizer = tokenizer
    render = RenderStage(
        dit, Autoencoder.of(vae), options.max_condition_length, options.max_drawn_pixels
    )
    built = assemble(Path(), language, render, options)
    return Engine(built.runner, built.scheduler, built.options, built.max_positions)


def _require_memory(
    parts: dict[str, nn.Module],
    config: KelixConfig,
    options: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raises CapacityError, with the ledger, when not even a cache of one request would fit."""
    ledger = {
        name: sum(t.numel() for t in (*part.parameters(), *part.buffers())) * dtype.itemsize
        for name, part in parts.items()
    }
    needs = language_workspaces(config, options, dtype)
    ledger["workspaces"] = sum(need.num_bytes for need in needs)
    ledger["keys and values of a drawing"] = (
        2 * BLOCKS * kv_bytes_per_block(config, cache_dtype(options, dtype))
    )
    needed, free = sum(ledger.values()), available_bytes(device)
    if needed > free:
        lines = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in ledger.items())
        raise CapacityError(
            f"bench: the random model needs {needed / 2**30:.1f} GiB of {device.type} memory "
            f"({lines}), but {free / 2**30:.1f} GiB are free"
        )


def _fill(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Norms at one, biases at zero, everything else normal with the spread of its inputs."""
    module.to(dtype).to_empty(device=device)
    module.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1 or name == "z_weight":
            parameter.fill_(1.0)
        else:
            spread = math.sqrt(len(parameter) / parameter.numel())
            parameter.normal_(0.0, spread, generator=generator)


def release_workload(engine: Engine, render: RenderParams, blocks: int = BLOCKS) -> Workload:
    """A drawing of so many blocks, and 64 blocks after a picture of 504 x 504 pixels."""
    qwen = engine.config.qwen_config
    vision = engine.config.tokenizer_config.vision_config
    side, patch = 36, vision.patch_size
    grid = torch.tensor([[1, side, side]])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(side * side, vision.num_channels, patch, patch, generator=generator)
    prompt = list(range(16))
    assert qwen.image_token_id is not None
    places = [qwen.image_token_id] * (side * side // 4)
    question = Prompt(
        [*prompt, engine.runner.vision_start, *places, engine.runner.vision_end, *prompt],
        pixel_values=pixels,
        image_grid_thw=grid,
    )
    drawing = SamplingParams(temperature=0.0, max_blocks=blocks, ignore_eos=True)
    answering = SamplingParams(temperature=0.0, max_blocks=ANSWER, ignore_eos=True)
    return Workload(pixels, grid, question, answering, Prompt(prompt), drawing, render)
