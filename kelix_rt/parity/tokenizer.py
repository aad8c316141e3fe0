"""Parity of the visual tokenizer with golden outputs of the released implementation.

A golden directory holds a checkpoint, `fixtures.safetensors` and (for global ids) `fixtures.json`.
In float32 tensors are compared absolutely and codes must be equal. In lower precisions the `bf16.*`
fixtures are compared by relative RMS and by the share of equal codes; one of them (codes from a
rounded encoder output) isolates the quantizer and must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from kelix_rt.config import KelixConfig, read_config
from kelix_rt.errors import ConfigError
from kelix_rt.models.vision_layout import PATCHES_PER_TOKEN, PatchLayout
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.models.vision_weights import CODE_EPS
from kelix_rt.ops import layer_norm
from kelix_rt.parity.report import Check, agreement, equal, max_abs, relative_rms

ABSOLUTE = 3e-5
WIDE_ABSOLUTE = 1e-4  # distances and fused embeddings, sums of many terms
RELATIVE = 2e-2
CODES_DIFFER = 0.06  # share of bfloat16 codes that may leave the bfloat16 golden run
OP_CODES_DIFFER = 0.01  # the same on a GPU for one op alone: sums in another order


@dataclass(frozen=True)
class Trace:
    """Every intermediate of one encode call, keyed as the fixtures are."""

    tensors: dict[str, Tensor]
    codes: Tensor


def run(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    prefix: str = "",
    keys: str = "",
) -> list[Check]:
    """Checks one golden directory; fixtures that are absent give no row.

    prefix: of the stored names, "visual_tokenizer." for the tokenizer of a language model. keys: of
    the fixtures, "vis/" there.
    """
    path = Path(path)
    model = VisionTokenizer.from_pretrained(path, prefix, device, dtype)
    stored = load_file(path / "fixtures.safetensors")
    golden = {k.removeprefix(keys): value for k, value in stored.items() if k.startswith(keys)}
    return compare(model, golden, _vocab_size(path))


def _vocab_size(path: Path) -> int | None:
    config, meta = read_config(path), path / "fixtures.json"
    if isinstance(config, KelixConfig):
        return config.qwen_config.vocab_size
    size: int | None = json.loads(meta.read_text()).get("vocab_size") if meta.is_file() else None
    return size


@torch.inference_mode()
def compare(
    model: VisionTokenizer, golden: dict[str, Tensor], vocab_size: int | None = None
) -> list[Check]:
    """Checks a loaded tokenizer against fixtures; `vocab_size` (text ids) enables global ids."""
    if "pixel_values" not in golden or "image_grid_thw" not in golden:
        return list(_codebook_only(model, golden))
    if model.dtype == torch.float32:
        return list(_float32(model, golden, vocab_size))
    return list(_low_precision(model, golden))


def trace(model: VisionTokenizer, pixel_values: Tensor, grid: Tensor) -> Trace:
    """Runs the tokenizer stage by stage and keeps what passes between the stages."""
    layout = model.layout(pixel_values, grid)
    kept: dict[str, Tensor] = {"patch_embed": model.flat_patches(pixel_values)}
    x = kept["pos_embed_out"] = model.embed_patches(pixel_values, layout)
    if len(model.layers):
        kept |= _first_attention(model, x, layout)
    for index, layer in enumerate(model.layers):
        x = kept[f"layer{index}_out"] = layer(x, layout)
    x = kept["ln_post"] = model.final_norm(x)
    x = kept["projector"] = model.merge(x, layout)
    if model.aligner is not None:
        kept["pre_llm_aligner"] = model.aligner(x)
    z = model.project(x)
    kept["encoder"] = z.flatten(1)
    kept["z_norm"] = _normed(model, z)
    return Trace(kept, model.quantize(z))


def _first_attention(model: VisionTokenizer, x: Tensor, layout: PatchLayout) -> dict[str, Tensor]:
    layer: Any = model.layers[0]
    y = layer.attention_norm(x)
    q, k, _ = layer.attention.rotated(y, layout)
    return {
        "layer0_q_rope": q,
        "layer0_k_rope": k,
        "layer0_attn_out": layer.attention(y, layout),
    }


def _normed(model: VisionTokenizer, z: Tensor) -> Tensor:
    """[T, N, d] -> [N, T, d]: what the quantizer compares with its codes."""
    pairs = zip(model.z_weight, model.z_bias, strict=True)
    books = [layer_norm(z[:, i], w, b, CODE_EPS) for i, (w, b) in enumerate(pairs)]
    return torch.stack(books)


def _codebook_only(model: VisionTokenizer, golden: dict[str, Tensor]) -> Iterator[Check]:
    key = "codebook" if model.dtype == torch.float32 else "bf16.codebook"
    if key in golden:
        yield max_abs(key, model.codebooks, golden[key], ABSOLUTE)


def _float32(
    model: VisionTokenizer, golden: dict[str, Tensor], vocab_size: int | None
) -> Iterator[Check]:
    got = trace(model, golden["pixel_values"], golden["image_grid_thw"])
    yield from _codebook_only(model, golden)
    for key, tensor in got.tensors.items():
        if key in golden:
            yield max_abs(key, tensor, golden[key], ABSOLUTE)
    exact = "exact_indices" if "exact_indices" in golden else "indices"
    if exact in golden:
        yield equal(exact, got.codes, golden[exact], "exact mode")
    if "indices" in golden:
        codes = model.encode(golden["pixel_values"], golden["image_grid_thw"], "reference")
        yield equal("indices", codes, golden["indices"], "reference mode")
    if "aligned_ids" in golden and vocab_size is not None:
        yield from _global_ids(model, got.codes, golden["aligned_ids"], vocab_size)
    yield from _distances(model, got, golden)
    yield from _fused(model, got.codes, golden)


def _global_ids(
    model: VisionTokenizer, codes: Tensor, want: Tensor, vocab_size: int
) -> Iterator[Check]:
    try:
        ids = model.global_ids(codes, vocab_size)
    except ConfigError as error:  # overlapping id ranges: refused on purpose, never a pass
        yield Check("aligned_ids", float("inf"), 0.0, False, str(error))
        return
    yield equal("aligned_ids", ids, want)


def _distances(model: VisionTokenizer, got: Trace, golden: dict[str, Tensor]) -> Iterator[Check]:
    """Squared distances recomputed in float64 from the model's own codes and inputs."""
    z, books = got.tensors["z_norm"].double(), model.codebooks.double()
    ordered, order = torch.cdist(z, books).square().topk(min(2, books.shape[1]), largest=False)
    if "dist_best" in golden:
        yield max_abs("dist_best", ordered[..., 0], golden["dist_best"], WIDE_ABSOLUTE)
    if ordered.shape[-1] < 2:
        return
    if "dist_second" in golden:
        yield max_abs("dist_second", ordered[..., 1], golden["dist_second"], WIDE_ABSOLUTE)
    if "second_index" in golden:
        yield equal("second_index", order[..., 1].T, golden["second_index"])
    if "gap_rel" in golden and "dist_best" in golden:
        # d(gap) <= (2 + gap) * d(distance) / distance: the tolerance of the distances carried over
        gap, best = golden["gap_rel"].double(), golden["dist_best"].double()
        ours = ((ordered[..., 1] - ordered[..., 0]) / ordered[..., 0]).cpu()
        scaled = (ours - gap) * best / (2 + gap)
        note = "in units of distance"
        yield max_abs("gap_rel", scaled, torch.zeros_like(scaled), WIDE_ABSOLUTE, note)


def _fused(model: VisionTokenizer, codes: Tensor, golden: dict[str, Tensor]) -> Iterator[Check]:
    vectors = model.lookup(codes).transpose(0, 1)
    for key in ("lookup", "z_q"):
        if key in golden:
            yield max_abs(key, vectors, golden[key], ABSOLUTE)
    if model.up_projectors is None:
        return
    embeds = model.embed(codes)
    if "token_embeds" in golden:
        yield max_abs("token_embeds", embeds, golden["token_embeds"], WIDE_ABSOLUTE)
    if "padded_embeds" in golden:
        want = golden["padded_embeds"]
        padded, mask = pad_embeds(embeds, golden["image_grid_thw"], want.shape[1])
        yield max_abs("padded_embeds", padded, want, WIDE_ABSOLUTE)
        if "pad_mask" in golden:
            yield max_abs("pad_mask", mask, golden["pad_mask"], 0.0)


def pad_embeds(embeds: Tensor, grid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[T, O] -> per image [B, width, O], zero-padded or cut, and the mask [B, 1, 1, width]."""
    lengths = (grid.prod(dim=1) // PATCHES_PER_TOKEN).tolist()
    rows = [F.pad(part[:width], (0, 0, 0, max(0, width - len(part))))
            for part in embeds.split(lengths)]  # fmt: skip
    used = torch.tensor(lengths).clamp(max=width)
    mask = (torch.arange(width) < used[:, None]).float()
    return torch.stack(rows), mask[:, None, None]


def _low_precision(model: VisionTokenizer, golden: dict[str, Tensor]) -> Iterator[Check]:
    got = trace(model, golden["pixel_values"], golden["image_grid_thw"])
    for key, tensor in (*got.tensors.items(), ("codebook", model.codebooks)):
        if f"bf16.{key}" in golden:
            yield relative_rms(f"bf16.{key}", tensor, golden[f"bf16.{key}"], RELATIVE)
    if "bf16.indices" in golden:
        codes = model.encode(golden["pixel_values"], golden["image_grid_thw"], "reference")
        note = "share of codes that differ"
        yield agreement("bf16.indices", codes, golden["bf16.indices"], CODES_DIFFER, note)
    key = "bf16.indices_from_encoder_fp32_rounded"
    if key in golden and "encoder" in golden and model.dtype == torch.bfloat16:
        books = (-1, model.config.n_q_tokens, model.config.code_dim)
        z = golden["encoder"].to(model.device, model.dtype).view(books)
        allowed = 0.0 if model.device.type == "cpu" else OP_CODES_DIFFER
        yield agreement(key, model.quantize(z, "reference"), golden[key], allowed)
