"""The operators of kelix_rt, usable on their own: `torch.ops.kelix.*` with typed wrappers.

Every operator `op` has a plain-torch reference `op_ref` with the same signature.
"""

from __future__ import annotations

from kelix_rt.ops._library import build_info  # first: the wrappers below need its schemas

# isort: split
from kelix_rt.ops._codes_forms import tune_nearest_codes
from kelix_rt.ops.activation import silu_mul, silu_mul_ref
from kelix_rt.ops.attention import (
    paged_attention,
    paged_attention_ref,
    rope_store_kv,
    rope_store_kv_ref,
)
from kelix_rt.ops.block_decoder import (
    BlockDecoderShape,
    block_decode,
    block_decode_ref,
    pack_block_decoder,
)
from kelix_rt.ops.codes import (
    block_embed,
    block_embed_ref,
    codebook_norms,
    nearest_codes,
    nearest_codes_ref,
)
from kelix_rt.ops.diffusion import (
    depthwise_glu,
    depthwise_glu_ref,
    euler_step,
    euler_step_ref,
    gated_residual,
    gated_residual_ref,
    modulate,
    modulate_ref,
    relu_linear_attention,
    relu_linear_attention_ref,
)
from kelix_rt.ops.linear import (
    skinny_linear,
    skinny_linear_int8,
    skinny_linear_int8_ref,
    skinny_linear_ref,
)
from kelix_rt.ops.norm import (
    add_rms_norm,
    add_rms_norm_ref,
    layer_norm,
    layer_norm_ref,
    rms_norm,
    rms_norm_ref,
)
from kelix_rt.ops.sampling import sample_blocks, sample_blocks_ref

__all__ = [
    "BlockDecoderShape",
    "add_rms_norm",
    "add_rms_norm_ref",
    "block_decode",
    "block_decode_ref",
    "block_embed",
    "block_embed_ref",
    "build_info",
    "codebook_norms",
    "depthwise_glu",
    "depthwise_glu_ref",
    "euler_step",
    "euler_step_ref",
    "gated_residual",
    "gated_residual_ref",
    "layer_norm",
    "layer_norm_ref",
    "modulate",
    "modulate_ref",
    "nearest_codes",
    "nearest_codes_ref",
    "pack_block_decoder",
    "paged_attention",
    "paged_attention_ref",
    "relu_linear_attention",
    "relu_linear_attention_ref",
    "rms_norm",
    "rms_norm_ref",
    "rope_store_kv",
    "rope_store_kv_ref",
    "sample_blocks",
    "sample_blocks_ref",
    "silu_mul",
    "silu_mul_ref",
    "skinny_linear",
    "skinny_linear_int8",
    "skinny_linear_int8_ref",
    "skinny_linear_ref",
    "tune_nearest_codes",
]
