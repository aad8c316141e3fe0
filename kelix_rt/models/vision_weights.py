"""Stored tensors of the vision tokenizer: the parameter table, and the codebooks built from it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.checkpoint import Checkpoint, Renames
from kelix_rt.config import TokenizerConfig
from kelix_rt.errors import WeightError
from kelix_rt.weights import Source, check_finite

CODE_EPS = 1e-5
UNUSED = (
    r"visual\.embeddings\.(packing_position_embedding|position_embedding)\..*",
    r"visual\.head\..*",
    r"quantizer\.\d+\.(embedding|embedding_proj|q_norm|voc_reducer)(\..*)?",  # see project_book
    r"up_projectors\..*",
)


def renames(prefix: str) -> Renames:
    """Turns the Hugging Face style names of older checkpoints into today's."""
    start = re.escape(prefix)
    inside = rf"^({start}visual\.(?:.*\.)?)"
    pairs = [(rf"^({start})visual\.vision_model\.", r"\1visual.")]
    for old, new in (
        ("layer_norm1", "sa_norm"),
        ("layer_norm2", "mlp_norm"),
        ("self_attn", "attn"),
        ("out_proj", "output_proj"),
        ("fc1", "w1"),
        ("fc2", "w2"),
        ("post_layernorm", "ln_post"),
    ):
        pairs.append((rf"{inside}{old}\.", rf"\1{new}."))
    pairs.append((rf"^({start})quant_projector\.", r"\1up_projectors."))
    return tuple(pairs)


def weight_map(config: TokenizerConfig, with_up_projectors: bool) -> dict[str, Source]:
    """Parameter of VisionTokenizer -> stored tensors: q|k|v fused, quantizers stacked."""
    vision, books = config.vision_config, range(config.n_q_tokens)
    kernel = (vision.hidden_size, vision.num_channels, vision.patch_size, vision.patch_size)
    patch = vision.num_channels * vision.patch_size**2
    per_book = (config.n_q_tokens, config.code_dim)
    vectors = ((config.code_dim,),) * config.n_q_tokens
    embeddings = "visual.embeddings"
    table = {
        "patch_embedding.weight": Source(
            (f"{embeddings}.patch_embedding.weight",),
            reshape=(vision.hidden_size, patch),
            parts=(kernel,),
        ),
        "patch_embedding.bias": Source((f"{embeddings}.patch_embedding.bias",)),
        "z_weight": Source(
            tuple(f"quantizer.{i}.z_norm.weight" for i in books), reshape=per_book, parts=vectors
        ),
        "z_bias": Source(
            tuple(f"quantizer.{i}.z_norm.bias" for i in books), reshape=per_book, parts=vectors
        ),
    }
    if vision.has_learnable_position_embedding:
        table["positions"] = Source((f"{embeddings}.position_embedding.weight",))
    for index in range(vision.num_hidden_layers):
        table |= _layer(f"layers.{index}", f"visual.encoder.layers.{index}", vision.use_qk_norm)
    table |= _affine("final_norm", "visual.ln_post") | _affine("merger.norm", "mlp_AR.pre_norm")
    table |= _affine("merger.inner", "mlp_AR.linear_1")
    table |= _affine("merger.outer", "mlp_AR.linear_2")
    table |= _affine("encoder", "encoder")
    if config.pre_llm_align:
        table |= _affine("aligner", "pre_llm_aligner")
    if with_up_projectors:
        table["up_projectors"] = Source(
            tuple(f"up_projectors.{i}.weight" for i in books),
            reshape=(config.n_q_tokens, config.output_dim, config.code_dim),
            parts=((config.output_dim, config.code_dim),) * config.n_q_tokens,
        )
    return table


def _affine(target: str, *stored: str) -> dict[str, Source]:
    return {
        f"{target}.{kind}": Source(tuple(f"{name}.{kind}" for name in stored))
        for kind in ("weight", "bias")
    }


def _layer(target: str, stored: str, qk_norm: bool) -> dict[str, Source]:
    attention = f"{stored}.attn"
    table = _affine(f"{target}.attention_norm", f"{stored}.sa_norm")
    table |= _affine(f"{target}.mlp_norm", f"{stored}.mlp_norm")
    table |= _affine(f"{target}.attention.qkv", *(f"{attention}.{n}_proj" for n in "qkv"))
    table |= _affine(f"{target}.attention.output", f"{attention}.output_proj")
    table |= _affine(f"{target}.up", f"{stored}.mlp.w1")
    table |= _affine(f"{target}.down", f"{stored}.mlp.w2")
    if qk_norm:
        table |= {
            f"{target}.attention.{n}_norm": Source((f"{attention}.{n}_norm.scale",)) for n in "qk"
        }
    return table


def codebook_names(config: TokenizerConfig) -> list[str]:
    """Stored tensors that the codebooks are computed from."""
    leaves = ["embedding.weight", "embedding_proj.weight", "embedding_proj.bias",
              "q_norm.weight", "q_norm.bias"]  # fmt: skip
    if config.add_voc_reducer:
        leaves.append("voc_reducer")
    return [f"quantizer.{i}.{leaf}" for i in range(config.n_q_tokens) for leaf in leaves]


def project_codebooks(
    config: TokenizerConfig,
    checkpoint: Checkpoint,
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The code vectors [N, K, code_dim]: raw tables projected and normalised (SimVQ).

    They do not depend on the input. Only the rows a sub-codebook uses are read, one table at a
    time: of eight stored tables of [65536, 4096] seven eighths are never touched.
    """
    shape = (config.n_q_tokens, config.codes_per_book, config.code_dim)
    books = torch.empty(shape, device=device, dtype=dtype)
    for index in range(config.n_q_tokens):
        reader = _BookReader(config, checkpoint, f"{prefix}quantizer.{index}.", device, dtype)
        books[index] = reader.project(index)
    return books


class _BookReader:
    """Reads the tensors of one quantizer with checks."""

    def __init__(
        self,
        config: TokenizerConfig,
        checkpoint: Checkpoint,
        start: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.checkpoint, self.start = config, checkpoint, start
        self.device, self.dtype = device, dtype

    def project(self, index: int) -> Tensor:
        """Code vectors [K, code_dim] of quantizer `index`."""
        width, raw = self.config.code_dim, self.config.init_embedding_dim
        table = self._table(index)
        if self.config.add_voc_reducer:
            shape = (self.config.codebook_size, self.config.codes_per_book)
            table = self._read("voc_reducer", shape).T @ table
        weight = self._read("embedding_proj.weight", (width, raw))
        projected = F.linear(table, weight, self._read("embedding_proj.bias", (width,)))
        norm = [self._read(f"q_norm.{kind}", (width,)) for kind in ("weight", "bias")]
        codes = ops.layer_norm(projected, norm[0], norm[1], CODE_EPS)
        check_finite(codes, f"{self.checkpoint.path}: codebook from {self.start}*")
        return codes

    def _table(self, index: int) -> Tensor:
        """The rows of the raw table in use: all, a block of the full table, or a stored block."""
        config, name = self.config, "embedding.weight"
        size, codes = config.codebook_size, config.codes_per_book
        stored = self.checkpoint.shape(self.start + name)
        full = (size, config.init_embedding_dim)
        if config.add_voc_reducer or codes == size:
            return self._read(name, full)
        if stored == full:
            return self._read(name, full, slice(codes * index, codes * (index + 1)))
        return self._read(name, (codes, config.init_embedding_dim))

    def _read(self, leaf: str, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        name = self.start + leaf
        stored = self.checkpoint.shape(name)
        if stored != shape:
            raise WeightError(
                f"{self.checkpoint.path}: {name} must have shape {list(shape)}, got {list(stored)}"
            )
        tensor = self.checkpoint.read(name, rows).to(device=self.device, dtype=self.dtype)
        check_finite(tensor, f"{self.checkpoint.path}: {name}")
        return tensor


def stored_up_projectors(config: TokenizerConfig, checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether the checkpoint holds up-projectors; a runtime for the language model needs none."""
    names: Iterator[str] = (f"{prefix}up_projectors.{i}.weight" for i in range(config.n_q_tokens))
    return any(name in checkpoint for name in names)
