"""The ledger of a whole engine, drawing included, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from kelix_rt.assets import bundled
from kelix_rt.checkpoint import Checkpoint
from kelix_rt.config import EngineConfig, KelixConfig, Quantization, SanaConfig, read_config
from kelix_rt.errors import ConfigError, InputError
from kelix_rt.ledger import MemoryEntry, MemoryPlan
from kelix_rt.loading import find_drawing
from kelix_rt.memory import (
    CODEBOOKS,
    ROTARY,
    VISION,
    codebook_bytes,
    rotary_bytes,
    weight_entries,
    with_cache,
)
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.weights import SCALE, float_dtype
from kelix_rt.workspace import language_workspaces, render_workspaces


def engine_plan(
    model: str | Path | KelixConfig,
    options: EngineConfig | None = None,
    *,
    dit: str | Path | None = None,
    vae: str | Path | None = None,
    dtype: torch.dtype | None = None,
    free_bytes: int | None = None,
) -> MemoryPlan:
    """What `Engine.from_pretrained` with these arguments takes, stage by stage.

    model: a checkpoint directory, kelix-tiny, or a config alone, from which sizes are derived (with
    a vision tokenizer, in bfloat16 unless dtype says otherwise). free_bytes: memory for everything;
    None books a cache for max_batch requests of full length. Raises InputError for a path that is
    no directory, ConfigError or WeightError for one that is no Kelix model, CapacityError when the
    cache does not fit.
    """
    options = options or EngineConfig()
    if isinstance(model, KelixConfig):
        config, stored = model, dtype or torch.bfloat16
        entries = config_entries(config, stored, options.quantization)
        drawing = find_drawing(None, dit, vae, options.drawing)
    else:
        directory = _directory(model)
        found = read_config(directory)
        if not isinstance(found, KelixConfig):
            raise ConfigError(
                f"plan: {directory} must hold a Kelix language model, got a {type(found).__name__}"
            )
        config = found
        stored = dtype or language_dtype(directory)
        entries = weight_entries(directory, stored, options.quantization)
        drawing = find_drawing(directory, dit, vae, options.drawing)
    entries += language_workspaces(config, options, stored)
    if drawing is not None:
        entries += drawing_entries(*drawing, options, stored)
    return with_cache(entries, config, options, stored, free_bytes)


def drawing_entries(
    dit: Path, vae: Path, options: EngineConfig, dtype: torch.dtype
) -> list[MemoryEntry]:
    """Weights and workspaces of the image DiT and its autoencoder. Raises ConfigError."""
    config, autoencoder = read_config(dit), read_config(vae)
    if not isinstance(config, SanaConfig) or not isinstance(autoencoder, dict):
        raise ConfigError(f"plan: {dit} must hold a SanaConfig, and {vae} a diffusers autoencoder")
    entries = [
        MemoryEntry(name, entry.num_bytes, "render")
        for name, path in (("image DiT", dit), ("autoencoder", vae))
        for entry in weight_entries(path, dtype)
    ]
    return entries + render_workspaces(config, autoencoder, options, dtype)


def config_entries(
    config: KelixConfig, dtype: torch.dtype, quantization: Quantization = None
) -> list[MemoryEntry]:
    """Weights of a language model and its vision tokenizer that exist as a config only."""
    with torch.device("meta"):
        model, tokenizer = KelixLM(config), VisionTokenizer(config.tokenizer_config)
        if quantization == "int8":
            model.quantize()
    sizes = {
        "backbone": _bytes(model.backbone, dtype),
        "embedding table": model.embeddings.numel() * dtype.itemsize,
        "output head": _stored_bytes(model.head, dtype) + _scale_bytes(model.head_scale),
        "block decoder": _bytes(model.block_decoder, dtype),
    }
    entries = [MemoryEntry(name, size, "generate") for name, size in sizes.items()]
    books = codebook_bytes(config.tokenizer_config, dtype)
    return [
        *entries,
        MemoryEntry(ROTARY, rotary_bytes(config), "generate"),
        MemoryEntry(VISION, _bytes(tokenizer, dtype), "encode"),
        MemoryEntry(CODEBOOKS, books, "encode"),
    ]


def language_dtype(directory: Path) -> torch.dtype:
    """The dtype that the language model of a checkpoint is stored in."""
    checkpoint = Checkpoint(directory)
    own = [name for name in checkpoint.names() if name.startswith("model.")]
    return float_dtype(checkpoint, own)


def _directory(model: str | Path) -> Path:
    directory = bundled(model) or Path(model).expanduser()
    if not directory.is_dir():
        raise InputError(f"plan: {model} is not a directory; a hub id has to be downloaded first")
    return directory


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Of the parameters once they are loaded in dtype, and of the scales of int8 ones."""
    sizes = [_stored_bytes(parameter, dtype) for parameter in module.parameters()]
    scales = [buffer.nbytes for name, buffer in module.named_buffers() if name.endswith(SCALE)]
    return sum(sizes) + sum(scales)


def _stored_bytes(weight: Tensor, dtype: torch.dtype) -> int:
    return weight.numel() * (dtype if weight.is_floating_point() else weight.dtype).itemsize


def _scale_bytes(scale: Tensor | None) -> int:
    return 0 if scale is None else scale.nbytes
