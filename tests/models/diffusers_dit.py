"""diffusers' SANA with the weights of an image DiT checkpoint: another oracle, and a peer."""

from __future__ import annotations

from diffusers import SanaTransformer2DModel
from torch import Tensor

from kelix_rt.config import SanaConfig

RENAMES = (
    ("x_embedder.proj", "patch_embed.proj"),
    ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    ("t_block.1", "time_embed.linear"),
    ("y_embedder.y_proj.fc", "caption_projection.linear_"),
    ("attention_y_norm", "caption_norm"),
    ("cross_attn.q_linear", "attn2.to_q"),
    ("cross_attn.to_", "attn2.to_"),
    ("cross_attn.proj", "attn2.to_out.0"),
    ("cross_attn.q_norm", "attn2.norm_q"),
    ("cross_attn.k_norm", "attn2.norm_k"),
    (".attn.to_", ".attn1.to_"),
    (".attn.proj", ".attn1.to_out.0"),
    (".attn.q_norm", ".attn1.norm_q"),
    (".attn.k_norm", ".attn1.norm_k"),
    ("mlp.inverted_conv.conv", "ff.conv_inverted"),
    ("mlp.depth_conv.conv", "ff.conv_depth"),
    ("mlp.point_conv.conv", "ff.conv_point"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
    ("blocks.", "transformer_blocks."),
)


def diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint under the names of diffusers' SanaTransformer2DModel."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(("pos_embed", "y_embedder.y_embedding", "diffusion_connector")):
            continue
        target = name
        for old, new in RENAMES:
            target = target.replace(old, new)
        renamed[target] = tensor
    return renamed


def diffusers_model(config: SanaConfig, tensors: dict[str, Tensor]) -> SanaTransformer2DModel:
    """The model of a config with the release's options; the caller runs the connector."""
    model = SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_attention_heads=config.hidden_size // config.linear_head_dim,
        attention_head_dim=config.linear_head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_heads,
        cross_attention_head_dim=config.hidden_size // config.num_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        mlp_ratio=config.mlp_ratio,
        attention_bias=False,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        qk_norm="rms_norm_across_heads",
        interpolation_scale=None,
    )
    model.load_state_dict(diffusers_names(tensors))
    return model.eval().requires_grad_(False)
