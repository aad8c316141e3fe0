"""The Block Decoder as a module: its weights, packed for the fused in-block loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kelix_rt.config import KelixConfig
from kelix_rt.ops.block_decoder import (
    LAYER_NORM_EPS,
    BlockDecoderShape,
    decoder_states,
    pack_block_decoder,
    unpack_block_decoder,
)
from kelix_rt.weights import Source


class BlockDecoderLayer(nn.Module):
    """Weights of one layer; named as `BlockDecoderShape.tensors` names them."""

    def __init__(self, d_model: int, ffn: int) -> None:
        super().__init__()
        self.sa_norm = nn.LayerNorm(d_model, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model, eps=LAYER_NORM_EPS)
        self.gate_up = nn.Linear(d_model, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, d_model, bias=False)


class BlockDecoder(nn.Module):
    """From a backbone state and the ids drawn so far to the states the head reads.

    After `pack` the parameters are views of `packed`, the weights `ops.block_decode` takes.
    """

    packed: Tensor

    def __init__(self, shape: BlockDecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.input_linear = nn.Linear(shape.input_dim, shape.d_model)
        # Not nn.Embedding(...): its random start on the meta device imports all of torch._dynamo.
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(shape.num_slots, shape.d_model), freeze=False
        )
        self.layers = nn.ModuleList(
            BlockDecoderLayer(shape.d_model, shape.ffn) for _ in range(shape.num_layers)
        )
        self.output_linear = nn.Linear(shape.d_model, shape.input_dim)
        self.register_buffer("packed", torch.empty(0), persistent=False)

    def pack(self) -> None:
        """Moves the weights into one tensor and makes the parameters views of it."""
        with torch.no_grad():
            self.packed = pack_block_decoder(dict(self.named_parameters()))
        views = unpack_block_decoder(self.packed, self.shape)
        for name, parameter in list(self.named_parameters()):
            path, _, leaf = name.rpartition(".")
            view = nn.Parameter(views[name], requires_grad=parameter.requires_grad)
            setattr(self.get_submodule(path), leaf, view)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: [B, n, D], the backbone state and then id embeddings, n <= N + 1.

        Returns [B, n, D], the residual with the inputs added, before the head's norm.
        """
        return decoder_states(inputs, dict(self.named_parameters()), self.shape.num_heads)


def block_decoder_sizes(config: KelixConfig) -> BlockDecoderShape:
    """Sizes of the configured Block Decoder; only positions 0..N of its table are ever used."""
    decoder = config.token_decoder_config
    return BlockDecoderShape(
        d_model=decoder.d_model,
        num_heads=decoder.nhead,
        num_layers=decoder.num_layers,
        ffn=decoder.dim_feedforward,
        input_dim=config.qwen_config.embed_dim,
        num_slots=config.num_codes + 1,
    )


def weight_map(shape: BlockDecoderShape) -> dict[str, Source]:
    """Block Decoder tensors by parameter name; q|k|v and gate|up are fused along dim 0."""
    root = "model.model.token_head."
    sources = {
        "position_embedding.weight": Source(
            (root + "position_embedding.weight",), rows=slice(0, shape.num_slots)
        )
    }
    for kind in ("weight", "bias"):
        for name in ("input_linear", "output_linear"):
            sources[f"{name}.{kind}"] = Source((f"{root}{name}.{kind}",))
    for index in range(shape.num_layers):
        stored, own = f"{root}transformer.layers.{index}.", f"layers.{index}."
        for kind in ("weight", "bias"):
            projections = tuple(f"{stored}attn.{name}_proj.{kind}" for name in "qkv")
            sources |= {
                f"{own}sa_norm.{kind}": Source((f"{stored}sa_norm.{kind}",)),
                f"{own}mlp_norm.{kind}": Source((f"{stored}mlp_norm.{kind}",)),
                f"{own}qkv.{kind}": Source(projections),
                f"{own}output.{kind}": Source((f"{stored}attn.output_proj.{kind}",)),
            }
        sources[f"{own}gate_up.weight"] = Source(
            (stored + "mlp.w1.weight", stored + "mlp.w3.weight")
        )
        sources[f"{own}down.weight"] = Source((stored + "mlp.w2.weight",))
    return sources
