"""The ledger of device memory: what a checkpoint takes, what is left for the KV cache.

Everything here is computed from configs and the headers of safetensors files, before a weight is
read.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from kelix_rt.checkpoint import Checkpoint
from kelix_rt.config import EngineConfig, KelixConfig, TokenizerConfig, read_config
from kelix_rt.errors import CapacityError
from kelix_rt.weights import float_dtype

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container its own group
WORKSPACE_TENSORS = 4  # activations of a step alive at once, in units of the widest one
OUTPUT_HEAD = "model.model.output.weight"
LM_HEAD = "lm_head.weight"
# Name of a tensor -> where it is booked; the first match counts, None is never loaded.
_GROUPS: tuple[tuple[str, str | None], ...] = (
    (r"lm_head\.", None),
    (r"token_head\.final_norm\.", None),
    (r"packing_position_embedding|(^|visual_tokenizer\.)up_projectors\.", None),
    (r"quantizer\.\d+\.(embedding|embedding_proj|voc_reducer)\b", None),  # projected at load
    (r"^pos_embed$", None),
    (
        r"^visual_tokenizer\.|^visual\.|^(mlp_AR|pre_llm_aligner|quantizer)\.|^encoder\.(weight|bias)$",
        "vision tokenizer",
    ),
    (r"\.tok_embeddings\.", "embedding table"),
    (r"^model\.model\.output\.", "output head"),
    (r"\.token_head\.", "block decoder"),
    (r"^model\.model\.", "backbone"),
)


@dataclass(frozen=True)
class MemoryEntry:
    """One line of the ledger."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a model needs. entries: weights and workspaces; the KV cache comes on top.

    kv_bytes_per_block: keys and values of one position in all layers. num_pages: KV pages of
    page_size positions, 0 for a model without a cache.
    """

    entries: tuple[MemoryEntry, ...]
    dtype: torch.dtype
    kv_bytes_per_block: int = 0
    page_size: int = 0
    num_pages: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.kv_bytes_per_block * self.page_size * self.num_pages

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return sum(entry.num_bytes for entry in self.entries) + self.kv_bytes

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) of every line, the KV cache and the total last; for printing."""
        lines = [(entry.name, entry.num_bytes) for entry in self.entries]
        if self.num_pages:
            name = f"KV cache ({self.num_pages} pages of {self.page_size} blocks)"
            lines.append((name, self.kv_bytes))
        return [*lines, ("total", self.total_bytes)]


def kv_bytes_per_block(config: KelixConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position, all layers together."""
    qwen = config.qwen_config
    return 2 * qwen.num_layers * qwen.num_kv_heads * qwen.head_dim * dtype.itemsize


def max_positions(config: KelixConfig, options: EngineConfig) -> int:
    """Longest prompt plus answer: the option, at most the model's table of positions."""
    limit = config.qwen_config.max_seq_len
    return limit if options.max_model_len is None else min(limit, options.max_model_len)


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

    Never more than max_batch requests of full length can use. Raises CapacityError when not even
    one page fits, or not as many as the option asks for.
    """
    page_bytes = kv_bytes_per_block(config, dtype) * options.page_size
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


def step_bytes(config: KelixConfig, options: EngineConfig, dtype: torch.dtype) -> int:
    """Upper estimate of the activations of one block step."""
    qwen = config.qwen_config
    rows = max(options.max_step_tokens, options.max_batch)
    heads = (qwen.num_heads + 2 * qwen.num_kv_heads) * qwen.head_dim
    widest = max(2 * qwen.intermediate_dim, heads, qwen.embed_dim)
    logits = options.max_batch * (qwen.vocab_size + qwen.codebook_size)
    return WORKSPACE_TENSORS * rows * widest * dtype.itemsize + logits * torch.float32.itemsize


def plan(
    path: str | Path,
    *,
    options: EngineConfig | None = None,
    dtype: torch.dtype | None = None,
    free_bytes: int | None = None,
) -> MemoryPlan:
    """The ledger of a checkpoint directory of any kind: Kelix, vision tokenizer, DiT or VAE.

    dtype: None takes the stored one. free_bytes: memory for weights, workspaces and the cache
    together; None books a cache for max_batch requests of full length (or `options.num_pages`).
    """
    options = options or EngineConfig()
    directory = Path(path)
    config = read_config(directory)
    checkpoint = Checkpoint(directory)
    stored = dtype or float_dtype(checkpoint, checkpoint.names())
    groups = _weights(checkpoint, stored)
    tokenizer = config.tokenizer_config if isinstance(config, KelixConfig) else config
    if isinstance(tokenizer, TokenizerConfig) and "vision tokenizer" in groups:
        groups["projected codebooks"] = _codebook_bytes(tokenizer, stored)
    entries = [MemoryEntry(name, size) for name, size in groups.items()]
    if not isinstance(config, KelixConfig):
        return MemoryPlan(tuple(entries), stored)
    entries.append(MemoryEntry("workspace of a step", step_bytes(config, options, stored)))
    rope = max_positions(config, options) * config.qwen_config.head_dim * torch.float32.itemsize
    entries.append(MemoryEntry("rotary table", rope))
    used = sum(entry.num_bytes for entry in entries)
    left = 1 << 62 if free_bytes is None else max(free_bytes - used, 0)
    pages = choose_pages(config, options, stored, left)
    per_block = kv_bytes_per_block(config, stored)
    return MemoryPlan(tuple(entries), stored, per_block, options.page_size, pages)


def _weights(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name in checkpoint.names():
        group = _group(name)
        if name == LM_HEAD and OUTPUT_HEAD not in checkpoint:
            group = "output head"  # the loader falls back to it
        if group is not None:
            count = 1
            for side in checkpoint.shape(name):
                count *= side
            sizes[group] = sizes.get(group, 0) + count * dtype.itemsize
    return sizes


def _group(name: str) -> str | None:
    for pattern, group in _GROUPS:
        if re.search(pattern, name):
            return group
    return "weights"


def _codebook_bytes(config: TokenizerConfig, dtype: torch.dtype) -> int:
    codes = config.n_q_tokens * config.codes_per_book
    return codes * (config.code_dim * dtype.itemsize + torch.float32.itemsize)
