"""What a checkpoint takes of a device's memory, and what is left for the KV cache.

Everything here is computed from configs and the headers of safetensors files, before a weight is
read.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kelix_rt.checkpoint import Checkpoint
from kelix_rt.config import (
    EngineConfig,
    KelixConfig,
    Quantization,
    TokenizerConfig,
    read_config,
)
from kelix_rt.errors import CapacityError
from kelix_rt.ledger import MemoryEntry, MemoryPlan, Stage
from kelix_rt.weights import float_dtype
from kelix_rt.workspace import language_workspaces, max_positions

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container its own group
OUTPUT_HEAD = "model.model.output.weight"
LM_HEAD = "lm_head.weight"
VISION = "vision tokenizer"
CODEBOOKS = "projected codebooks"
ROTARY = "rotary table"
# Name of a tensor -> where it is booked; the first match counts, None is never loaded.
_GROUPS: tuple[tuple[str, str | None], ...] = (
    (r"lm_head\.", None),
    (r"token_head\.final_norm\.", None),
    (r"packing_position_embedding|(^|\.)visual\.head\.", None),
    (r"quantizer\.\d+\.(embedding|embedding_proj|q_norm|voc_reducer)\b", None),  # projected at load
    (r"^pos_embed$", None),
    (r"^encoder\.\w+\.", None),  # of the autoencoder: drawing does without
    (r"^visual_tokenizer\.|^visual\.|^encoder\.(weight|bias)$", VISION),
    (r"^(mlp_AR|pre_llm_aligner|quantizer|up_projectors)\.", VISION),
    (r"\.tok_embeddings\.", "embedding table"),
    (r"^model\.model\.output\.", "output head"),
    (r"\.token_head\.", "block decoder"),
    (r"^model\.model\.", "backbone"),
)


# The matrices that quantization="int8" turns into int8.
_QUANTIZED = r"^(model\.model\.(layers\.\d+\.(attn\.\w+_proj|mlp\.w\d)|output)|lm_head)\.weight$"


def cache_dtype(options: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """What the KV cache of a model of this dtype holds."""
    return torch.float8_e4m3fn if options.kv_dtype == "fp8" else dtype


def kv_bytes_per_block(config: KelixConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position, all layers together. dtype: of the cache."""
    qwen = config.qwen_config
    return 2 * qwen.num_layers * qwen.num_kv_heads * qwen.head_dim * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Free memory of a device: of the GPU, or the machine's available main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Not sysconf's free pages: they leave out the file cache, which a checkpoint just filled.
    found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    if found is None:
        raise CapacityError(f"available_bytes: {MEMINFO} names no MemAvailable; pass num_pages")
    return min(int(found[1]) * 1024, container_bytes())


def container_bytes() -> int:
    """What the control group of this process may still take, file cache it can drop included."""
    limit = CGROUP / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return sys.maxsize
    stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    return max(0, int(limit.read_text()) - used)


def choose_pages(
    config: KelixConfig, options: EngineConfig, dtype: torch.dtype, free_bytes: int
) -> int:
    """Number of KV pages: the option, or what fits in a share of `free_bytes`.

    dtype: the model's; the cache's follows from the options. Never more than max_batch requests of
    full length can use. Raises CapacityError when not even one page fits, or not as many as the
    option asks for.
    """
    page_bytes = kv_bytes_per_block(config, cache_dtype(options, dtype)) * options.page_size
    if options.num_pages is not None:
        if options.num_pages * page_bytes > free_bytes:
            raise CapacityError(
                f"KV cache: num_pages={options.num_pages} pages of {page_bytes} bytes do not fit "
                f"in the {free_bytes} bytes that are free; lower num_pages"
            )
        return options.num_pages
    useful = options.max_batch * -(-max_positions(config, options) // options.page_size)
    fitting = int(free_bytes * options.kv_memory_fraction) // page_bytes
    if fitting < 1:
        raise CapacityError(
            f"KV cache: a page takes {page_bytes} bytes, but only {options.kv_memory_fraction:.0%} "
            f"of {free_bytes} bytes are free; raise kv_memory_fraction or use a smaller model"
        )
    return min(useful, fitting)


def plan(
    path: str | Path,
    *,
    options: EngineConfig | None = None,
    dtype: torch.dtype | None = None,
    free_bytes: int | None = None,
) -> MemoryPlan:
    """The ledger of a checkpoint directory of any kind: Kelix, vision tokenizer, DiT or VAE.

    A Kelix model's is without drawing, which `kelix_rt.planning.engine_plan` adds. dtype: None
    takes the stored one. free_bytes: memory for weights, workspaces and the cache together; None
    books a cache for max_batch requests of full length (or `options.num_pages`). Raises
    CapacityError where nothing is left for the cache.
    """
    options = options or EngineConfig()
    directory = Path(path)
    config = read_config(directory)
    checkpoint = Checkpoint(directory)
    stored = dtype or float_dtype(checkpoint, checkpoint.names())
    if not isinstance(config, KelixConfig):
        return MemoryPlan(tuple(weight_entries(directory, stored)), stored)
    entries = weight_entries(directory, stored, options.quantization)
    entries += language_workspaces(config, options, stored)
    return with_cache(entries, config, options, stored, free_bytes)


def with_cache(
    entries: Sequence[MemoryEntry],
    config: KelixConfig,
    options: EngineConfig,
    dtype: torch.dtype,
    free_bytes: int | None,
) -> MemoryPlan:
    """The plan of these entries with the KV cache that fits beside them; as `plan`."""
    used = sum(entry.num_bytes for entry in entries)
    left = 1 << 62 if free_bytes is None else max(free_bytes - used, 0)
    return MemoryPlan(
        tuple(entries),
        dtype,
        kv_bytes_per_block(config, cache_dtype(options, dtype)),
        options.page_size,
        choose_pages(config, options, dtype, left),
        max_positions(config, options),
        options.max_batch,
        free_bytes,
    )


def weight_entries(
    directory: Path, dtype: torch.dtype, quantization: Quantization = None
) -> list[MemoryEntry]:
    """Weights of a checkpoint directory, from the headers of its files, and tables made of them."""
    config, checkpoint = read_config(directory), Checkpoint(directory)
    groups = _weights(checkpoint, dtype, quantization == "int8")
    tokenizer = config.tokenizer_config if isinstance(config, KelixConfig) else config
    if isinstance(tokenizer, TokenizerConfig) and VISION in groups:
        groups[CODEBOOKS] = codebook_bytes(tokenizer, dtype)
    if isinstance(config, KelixConfig):
        groups[ROTARY] = rotary_bytes(config)
    rest: Stage = "generate" if isinstance(config, KelixConfig) else "render"
    return [
        MemoryEntry(name, size, "encode" if name in (VISION, CODEBOOKS) else rest)
        for name, size in groups.items()
    ]


def _weights(checkpoint: Checkpoint, dtype: torch.dtype, int8: bool) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name in checkpoint.names():
        group = _group(name)
        if name == LM_HEAD and OUTPUT_HEAD not in checkpoint:
            group = "output head"  # the loader falls back to it
        if group is not None:
            shape = checkpoint.shape(name)
            size = math.prod(shape) * dtype.itemsize
            if int8 and re.search(_QUANTIZED, name):
                size = math.prod(shape) + shape[0] * torch.float32.itemsize
            sizes[group] = sizes.get(group, 0) + size
    return sizes


def _group(name: str) -> str | None:
    for pattern, group in _GROUPS:
        if re.search(pattern, name):
            return group
    return "weights"


def rotary_bytes(config: KelixConfig) -> int:
    """Bytes of the table of rotary positions, always float32."""
    return config.qwen_config.max_seq_len * config.qwen_config.head_dim * torch.float32.itemsize


def codebook_bytes(config: TokenizerConfig, dtype: torch.dtype) -> int:
    """Bytes of the code vectors as they are kept, and of their norms."""
    codes = config.n_q_tokens * config.codes_per_book
    norms = 2 * torch.float32.itemsize  # of either way to compare
    return codes * (config.code_dim * dtype.itemsize + norms)
