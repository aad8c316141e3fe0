"""Where the image DiT's parameters come from, and checks of a checkpoint against its config."""

from __future__ import annotations

from kelix_rt.config import SanaConfig
from kelix_rt.errors import WeightError
from kelix_rt.weights import Checkpoint, Source

CONDITION_ROWS = "y_embedder.y_embedding"
UNUSED = (r"pos_embed",)  # position tables are always regenerated


def condition_rows(checkpoint: Checkpoint) -> int:
    """Rows of the unconditional embedding: config.json states an older length than the tensor.

    Raises WeightError when the tensor is missing or is not a matrix.
    """
    if CONDITION_ROWS not in checkpoint.names():
        raise WeightError(f"{checkpoint.path}: missing 1 tensors: ['{CONDITION_ROWS}']")
    shape = tuple(checkpoint.shape(CONDITION_ROWS))
    if len(shape) != 2 or shape[0] < 1:
        raise WeightError(f"{CONDITION_ROWS} must have shape [L, P], got {list(shape)}")
    return int(shape[0])


def check_options(config: SanaConfig, checkpoint: Checkpoint) -> None:
    """Raises WeightError where a config option contradicts the tensors that reveal it."""
    names = set(checkpoint.names())
    convolutional = config.ffn_type == "glumbconv"
    revealed = (
        ("qk_norm", "blocks.0.attn.q_norm.weight", config.qk_norm),
        ("cross_norm", "blocks.0.cross_attn.q_norm.weight", config.cross_norm),
        ("y_norm", "attention_y_norm.weight", config.y_norm),
        ("use_connector", "diffusion_connector.0.weight", config.use_connector),
        ("attn_type", "blocks.0.attn.to_q.bias", config.attn_type == "flash"),
        ("ffn_type", "blocks.0.mlp.inverted_conv.conv.weight", convolutional),
        ("depth", f"blocks.{config.depth}.scale_shift_table", False),
    )
    for option, name, expected in revealed:
        if (name in names) != expected:
            raise WeightError(
                f"{checkpoint.path}: config.{option}={getattr(config, option)!r}, but the "
                f"checkpoint {'has' if name in names else 'lacks'} {name}; correct config.json"
            )


def _linear(target: str, *stored: str, bias: bool = True) -> dict[str, Source]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{target}.{k}": Source(tuple(f"{name}.{k}" for name in stored)) for k in kinds}


def _attention(config: SanaConfig, target: str, stored: str) -> dict[str, Source]:
    softmax = config.attn_type == "flash"
    parts = [f"{stored}.to_{part}" for part in "qkv"]
    table = _linear(f"{target}.qkv", *parts, bias=softmax)
    table |= _linear(f"{target}.proj", f"{stored}.proj")
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            table[f"{target}.{norm}"] = Source((f"{stored}.{norm}.weight",))
            if softmax:
                table[f"{target}.{norm}_bias"] = Source((f"{stored}.{norm}.bias",))
    return table


def _cross_attention(config: SanaConfig, target: str, stored: str) -> dict[str, Source]:
    table = _linear(f"{target}.q", f"{stored}.q_linear")
    table |= _linear(f"{target}.kv", f"{stored}.to_k", f"{stored}.to_v")
    table |= _linear(f"{target}.proj", f"{stored}.proj")
    if config.cross_norm:
        for norm in ("q_norm", "k_norm"):
            table[f"{target}.{norm}"] = Source((f"{stored}.{norm}.weight",))
    return table


def _feed_forward(config: SanaConfig, target: str, stored: str) -> dict[str, Source]:
    if config.ffn_type == "mlp":
        return _linear(f"{target}.fc1", f"{stored}.fc1") | _linear(f"{target}.fc2", f"{stored}.fc2")
    width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)

    def conv(name: str, rows: int, *shape: int, kernel: tuple[int, ...]) -> Source:
        return Source((f"{stored}.{name}",), reshape=(rows, *shape), parts=((rows, *kernel),))

    return {
        f"{target}.expand.weight": conv(
            "inverted_conv.conv.weight", 2 * inner, width, kernel=(width, 1, 1)
        ),
        f"{target}.expand.bias": Source((f"{stored}.inverted_conv.conv.bias",)),
        f"{target}.depth_weight": conv("depth_conv.conv.weight", 2 * inner, 3, 3, kernel=(1, 3, 3)),
        f"{target}.depth_bias": Source((f"{stored}.depth_conv.conv.bias",)),
        f"{target}.point.weight": conv(
            "point_conv.conv.weight", width, inner, kernel=(inner, 1, 1)
        ),
    }


def weight_map(config: SanaConfig) -> dict[str, Source]:
    """Parameter of KelixDiT -> stored tensors: q|k|v and k|v fused, convolutions as matrices."""
    kernel = (config.in_channels, config.patch_size, config.patch_size)
    patch = config.in_channels * config.patch_size**2
    shapes = ((6, config.hidden_size),) * config.depth + ((2, config.hidden_size),)
    tables = tuple(f"blocks.{i}.scale_shift_table" for i in range(config.depth))
    table = {
        "x_embedder.weight": Source(
            ("x_embedder.proj.weight",),
            reshape=(config.hidden_size, patch),
            parts=((config.hidden_size, *kernel),),
        ),
        "x_embedder.bias": Source(("x_embedder.proj.bias",)),
        "y_embedding": Source((CONDITION_ROWS,)),
        "modulation_table": Source((*tables, "final_layer.scale_shift_table"), parts=shapes),
    }
    table |= _linear("time_in", "t_embedder.mlp.0") | _linear("time_out", "t_embedder.mlp.2")
    table |= _linear("time_modulation", "t_block.1")
    table |= _linear("caption_in", "y_embedder.y_proj.fc1")
    table |= _linear("caption_out", "y_embedder.y_proj.fc2")
    table |= _linear("final", "final_layer.linear")
    if config.y_norm:
        table["y_norm"] = Source(("attention_y_norm.weight",))
    if config.use_connector:
        table |= _linear("connector_in", "diffusion_connector.0")
        table |= _linear("connector_out", "diffusion_connector.2")
        table["connector_norm"] = Source(("diffusion_connector.3.weight",))
    for i in range(config.depth):
        target = stored = f"blocks.{i}"
        table |= _attention(config, f"{target}.attn", f"{stored}.attn")
        table |= _cross_attention(config, f"{target}.cross", f"{stored}.cross_attn")
        table |= _feed_forward(config, f"{target}.mlp", f"{stored}.mlp")
    return table
