"""What `kelix info` tells: the installation, and what a checkpoint holds and costs.

Nothing here loads a weight: a checkpoint is described from its config and the headers of its files.
"""

from __future__ import annotations

import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kelix_rt
from kelix_rt.assets import bundled
from kelix_rt.config import (
    EngineConfig,
    KelixConfig,
    ModelConfig,
    SanaConfig,
    TokenizerConfig,
    VisionConfig,
    read_config,
)
from kelix_rt.errors import CapacityError, InputError, NativeError
from kelix_rt.memory import MemoryPlan, plan
from kelix_rt.processing.text import TOKENIZER_FILES

Facts = dict[str, Any]
LENGTHS = (256, 1024, 4096, 16384)  # of requests whose number at once is told, in blocks


def installation() -> Facts:
    """Versions, what the native library was built for, and the devices there are."""
    return {
        "kelix_rt": kelix_rt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "native": native(),
        "gpus": gpus(),
    }


def native() -> Facts:
    """The operator library: `isa` it runs here and `cuda` targets built in; or why it is absent.

    cuda is [] for a library built without nvcc; cutlass the version of its headers, or None.
    """
    try:
        from kelix_rt.ops import build_info
    except NativeError as error:
        return {"error": str(error)}
    fields = build_info()
    targets = re.split(r"[,;]", fields["cuda"]) if fields["cuda"] else []
    return {"isa": fields["isa"], "cuda": targets, "cutlass": fields.get("cutlass")}


def gpus() -> list[Facts]:
    """Name, compute capability and bytes of memory of each visible CUDA device."""
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        memory = device.total_memory
        found.append({"name": device.name, "capability": capability, "memory": memory})
    return found


def checkpoint(
    path: str | Path,
    *,
    options: EngineConfig | None = None,
    dtype: torch.dtype | None = None,
    free_bytes: int | None = None,
) -> Facts:
    """What a local checkpoint directory of any kind (or kelix-tiny) holds, and its memory ledger.

    options, dtype, free_bytes: as `kelix_rt.memory.plan`. Subfolders dit/ and vae/ are described
    too. Raises InputError for a path that is no directory, ConfigError or WeightError for one that
    is no checkpoint.
    """
    directory = bundled(path) or Path(path).expanduser()
    if not directory.is_dir():
        raise InputError(f"info: {path} is not a directory; a hub id has to be downloaded first")
    parts = [directory / name for name in ("dit", "vae") if (directory / name).is_dir()]
    if not (directory / "config.json").exists() and parts:
        return {"path": str(directory), "parts": [checkpoint(part, dtype=dtype) for part in parts]}
    config = read_config(directory)
    memory = _memory(directory, options or EngineConfig(), dtype, free_bytes)
    facts = {"path": str(directory), **describe(config), "memory": memory}
    if isinstance(config, KelixConfig):
        has_text = any((directory / name).is_file() for name in TOKENIZER_FILES)
        facts["text tokenizer"] = has_text
    if parts:
        facts["parts"] = [checkpoint(part, dtype=dtype) for part in parts]
    return facts


def describe(config: ModelConfig) -> Facts:
    """The facts of a config that tell one model from another."""
    if isinstance(config, KelixConfig):
        return {"kind": "Kelix language model", **_language_model(config)}
    if isinstance(config, TokenizerConfig):
        return {"kind": "vision tokenizer", **_tokenizer(config)}
    if isinstance(config, SanaConfig):
        return {"kind": "image DiT", **_dit(config)}
    return {"kind": f"diffusers {config['_class_name']}"}


def _language_model(config: KelixConfig) -> Facts:
    qwen, decoder = config.qwen_config, config.token_decoder_config
    return {
        "backbone": f"{qwen.num_layers} layers, width {qwen.embed_dim}, {qwen.num_heads} heads "
        f"of {qwen.head_dim} ({qwen.num_kv_heads} for keys and values)",
        "block decoder": f"{decoder.num_layers} layers, width {decoder.d_model}",
        "ids": f"{qwen.vocab_size} text, {qwen.n_q_tokens} x {qwen.codes_per_book} visual",
        "block": f"{qwen.n_q_tokens} codes and an end",
        "positions": qwen.max_seq_len,
        "vision": _vision(config.tokenizer_config.vision_config),
    }


def _tokenizer(config: TokenizerConfig) -> Facts:
    books = f"{config.n_q_tokens} of {config.codes_per_book} codes, {config.code_dim} channels"
    return {"vision": _vision(config.vision_config), "codebooks": books}


def _vision(config: VisionConfig) -> str:
    return (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"patches of {config.patch_size} x {config.patch_size}"
    )


def _dit(config: SanaConfig) -> Facts:
    pixels = config.input_size * config.vae_downsample_rate
    condition = config.connector_channels if config.use_connector else config.caption_channels
    return {
        "blocks": f"{config.depth}, width {config.hidden_size}",
        "image": f"{pixels} x {pixels} pixels, {config.in_channels} latent channels",
        "condition": f"{condition} channels",
    }


def engine(
    model: str | Path,
    *,
    dit: str | Path | None = None,
    vae: str | Path | None = None,
    options: EngineConfig | None = None,
    dtype: torch.dtype | None = None,
    free_bytes: int | None = None,
) -> Facts:
    """The memory of a whole engine by stage, and how many requests of a length run at once.

    Arguments and errors as `kelix_rt.planning.engine_plan`; with an `error` and a cache of one page
    when the memory does not suffice.
    """
    from kelix_rt.planning import engine_plan  # knows the models, and so needs the native library

    options = options or EngineConfig()
    try:
        found = engine_plan(model, options, dit=dit, vae=vae, dtype=dtype, free_bytes=free_bytes)
        return _engine(found)
    except CapacityError as error:
        one = replace(options, num_pages=1)
        least = engine_plan(model, one, dit=dit, vae=vae, dtype=dtype)
        return {**_engine(least), "free": free_bytes, "error": str(error)}


def _engine(ledger: MemoryPlan) -> Facts:
    lengths = [length for length in LENGTHS if length < ledger.max_positions]
    requests = [
        {"blocks": length, "requests": ledger.concurrency(length)}
        for length in [*lengths, ledger.max_positions]
    ]
    entries = [
        {"stage": entry.stage, "name": entry.name, "kind": entry.kind, "bytes": entry.num_bytes}
        for entry in ledger.entries
    ]
    return {
        "dtype": str(ledger.dtype).removeprefix("torch."),
        "entries": entries,
        "loaded": ledger.bytes_of("loaded"),
        "transient": ledger.bytes_of("transient"),
        "pages": ledger.num_pages,
        "page_size": ledger.page_size,
        "kv_bytes": ledger.kv_bytes,
        "total": ledger.total_bytes,
        "free": ledger.free_bytes,
        "max_batch": ledger.max_batch,
        "concurrency": requests,
    }


def _memory(
    directory: Path, options: EngineConfig, dtype: torch.dtype | None, free_bytes: int | None
) -> Facts:
    """The ledger; with an `error` and a cache of one page when the memory does not suffice."""
    try:
        return _ledger(plan(directory, options=options, dtype=dtype, free_bytes=free_bytes))
    except CapacityError as error:
        least = plan(directory, options=replace(options, num_pages=1), dtype=dtype)
        return {**_ledger(least), "error": str(error)}


def _ledger(ledger: MemoryPlan) -> Facts:
    return {
        "dtype": str(ledger.dtype).removeprefix("torch."),
        "kv_bytes_per_block": ledger.kv_bytes_per_block,
        "rows": [{"name": name, "bytes": size} for name, size in ledger.rows()],
        "total": ledger.total_bytes,
    }
