"""What the stages need besides weights: buffers, and upper estimates of activations."""

from __future__ import annotations

from typing import Any

import torch

from kelix_rt.config import EngineConfig, KelixConfig, SanaConfig
from kelix_rt.denoise_graphs import DENOISE_ROWS
from kelix_rt.ledger import MemoryEntry
from kelix_rt.quantization import TILE_GPU
from kelix_rt.scheduler import MAX_RENDER_BATCH
from kelix_rt.stages.denoise import KEPT_STEPS
from kelix_rt.step_layout import block_rows, buckets, buffer_bytes

ALIVE = 4  # activations of a step alive at once, in units of the widest one
DRAW_FLOATS = 5  # per id a slot may take: its logit, and draw_workspace of csrc/common/sampling.h
GRAPH_BYTES = 16 << 20  # what the driver may keep of one graph of some hundred kernels: a guess


def max_positions(config: KelixConfig, options: EngineConfig) -> int:
    """Longest prompt plus answer: the option, at most the model's table of positions."""
    limit = config.qwen_config.max_seq_len
    return limit if options.max_model_len is None else min(limit, options.max_model_len)


def language_workspaces(
    config: KelixConfig, options: EngineConfig, dtype: torch.dtype
) -> list[MemoryEntry]:
    """Of block steps and of encoding an image."""
    side = config.tokenizer_config.vision_config.image_size
    pages = -(-max_positions(config, options) // options.page_size)
    buffer = buffer_bytes(config.num_codes + 1, options.max_step_tokens, options.max_batch, pages)
    encode = f"workspace of encoding {side} x {side} pixels"
    graphs = MemoryEntry("decode graphs", _decode_graph_bytes(config, options, dtype), "generate")
    tile = MemoryEntry(
        "int8 tile of many rows", _tile_bytes(config, dtype), "generate", "transient"
    )
    return [
        *([tile] if options.quantization == "int8" else []),
        *([graphs] if options.cuda_graphs and not options.verify_head else []),
        MemoryEntry("step buffers", buffer, "generate"),
        MemoryEntry(encode, _encode_bytes(config, dtype), "encode", "transient"),
        MemoryEntry(
            "workspace of a step", _step_bytes(config, options, dtype), "generate", "transient"
        ),
    ]


def render_workspaces(
    dit: SanaConfig, vae: dict[str, Any], options: EngineConfig, dtype: torch.dtype
) -> list[MemoryEntry]:
    """Of the images that are drawn at once, at the model's own size, and of denoise graphs."""
    condition = 2 * dit.depth * options.max_condition_length * dit.hidden_size * dtype.itemsize
    modulation = (6 * dit.depth + 2) * KEPT_STEPS * dit.hidden_size * dtype.itemsize
    tokens = (dit.input_size // dit.patch_size) ** 2
    widest = max(3 * dit.hidden_size, int(2 * dit.mlp_ratio * dit.hidden_size))
    rows = 2 * MAX_RENDER_BATCH  # with guidance
    held = MAX_RENDER_BATCH + rows + 1  # each drawing's own, those of the batch, no condition
    denoise = rows * tokens * widest
    decode = (dit.input_size * dit.vae_downsample_rate) ** 2 * _vae_width(vae)
    both = ALIVE * max(denoise, decode) * dtype.itemsize
    lines = (
        (f"conditions of {MAX_RENDER_BATCH} drawings", held * condition),
        (f"modulation of {KEPT_STEPS} steps", modulation),
        ("workspace of denoising and decoding", both),
    )
    entries = [MemoryEntry(name, size, "render", "transient") for name, size in lines]
    if options.cuda_graphs:
        pool = ALIVE * DENOISE_ROWS * tokens * widest * dtype.itemsize
        graphs = DENOISE_ROWS * (condition + GRAPH_BYTES) + pool
        entries.append(MemoryEntry("denoise graphs", graphs, "render"))
    return entries


def _decode_graph_bytes(config: KelixConfig, options: EngineConfig, dtype: torch.dtype) -> int:
    """The memory pool that all decode graphs share, as the largest needs it, and the graphs."""
    qwen = config.qwen_config
    rows = min(options.max_batch, options.max_step_tokens)
    admitted = qwen.vocab_size + qwen.codes_per_book  # ids of the first slot, the most of all
    draws = 5 * rows * admitted * torch.float32.itemsize  # their logits and what sorts them
    activations = ALIVE * rows * _widest(config) * dtype.itemsize
    return draws + activations + len(buckets(rows)) * GRAPH_BYTES


def _widest(config: KelixConfig) -> int:
    """Elements of a row of the widest activation."""
    qwen = config.qwen_config
    heads = (qwen.num_heads + 2 * qwen.num_kv_heads) * qwen.head_dim
    return max(2 * qwen.intermediate_dim, heads, qwen.embed_dim)


def _step_bytes(config: KelixConfig, options: EngineConfig, dtype: torch.dtype) -> int:
    qwen = config.qwen_config
    rows = max(options.max_step_tokens, options.max_batch)
    logits = block_rows(options.max_batch) * (qwen.vocab_size + qwen.codebook_size)
    return ALIVE * rows * _widest(config) * dtype.itemsize + logits * torch.float32.itemsize


def _tile_bytes(config: KelixConfig, dtype: torch.dtype) -> int:
    """Int8 weights made floating again, in float32 and then in dtype."""
    qwen = config.qwen_config
    heads = (qwen.num_heads + 2 * qwen.num_kv_heads) * qwen.head_dim
    largest = qwen.embed_dim * max(2 * qwen.intermediate_dim, heads)
    return min(TILE_GPU, largest) * (torch.float32.itemsize + dtype.itemsize)


def _encode_bytes(config: KelixConfig, dtype: torch.dtype) -> int:
    vision = config.tokenizer_config.vision_config
    widest = max(3 * vision.hidden_size, vision.intermediate_size)
    return ALIVE * vision.grid**2 * widest * dtype.itemsize


def _vae_width(vae: dict[str, Any]) -> int:
    """Channels of the autoencoder's decoder at full size."""
    channels: int = vae["decoder_block_out_channels"][0]
    return channels
