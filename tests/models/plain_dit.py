"""The image DiT in plain torch, straight from its formulas and with the stored tensor names.

It computes what the released model computes, in the same order and with the same roundings, one
torch call per formula. The package's model is compared with it where no golden output exists, and
the benchmarks time it as the thing to beat.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

BASE: dict[str, Any] = {
    "input_size": 6,
    "patch_size": 1,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "caption_channels": 20,
    "model_max_length": 5,
    "linear_head_dim": 8,
    "qk_norm": True,
    "cross_norm": True,
    "use_connector": True,
    "connector_channels": 28,
    "vae_downsample_rate": 32,
    "__class__": "SanaConfig",
}
ROWS = 16


def options(**changes: Any) -> dict[str, Any]:
    """A small config with these fields changed."""
    config = {**BASE, **changes}
    if not config["use_connector"]:
        config["connector_channels"] = None
    return config


def random_tensors(config: dict[str, Any], rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of the config with random values of sensible size."""
    c, p, k = config["hidden_size"], config["caption_channels"], config["connector_channels"]
    m, area = int(c * config["mlp_ratio"]), config["patch_size"] ** 2
    out = config["in_channels"] * (2 if config.get("pred_sigma") else 1)
    side = config["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 36, c),
        "x_embedder.proj.weight": (c, config["in_channels"], side, side),
        "x_embedder.proj.bias": (c,),
        "y_embedder.y_embedding": (rows, p),
        "final_layer.scale_shift_table": (2, c),
    }

    def linear(name: str, to: int, width: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (to, width)
        if bias:
            shapes[f"{name}.bias"] = (to,)

    linear("t_embedder.mlp.0", c, 256)
    linear("t_embedder.mlp.2", c, c)
    linear("t_block.1", 6 * c, c)
    linear("y_embedder.y_proj.fc1", c, p)
    linear("y_embedder.y_proj.fc2", c, c)
    linear("final_layer.linear", area * out, c)
    if config["use_connector"]:
        linear("diffusion_connector.0", p, k)
        linear("diffusion_connector.2", p, p)
        shapes["diffusion_connector.3.weight"] = (p,)
    if config.get("y_norm", True):
        shapes["attention_y_norm.weight"] = (c,)
    flash = config.get("attn_type") == "flash"
    for i in range(config["depth"]):
        b = f"blocks.{i}"
        shapes[f"{b}.scale_shift_table"] = (6, c)
        for part in "qkv":
            linear(f"{b}.attn.to_{part}", c, c, bias=flash)
        linear(f"{b}.attn.proj", c, c)
        for part in ("q_linear", "to_k", "to_v", "proj"):
            linear(f"{b}.cross_attn.{part}", c, c)
        for part in "qk":
            if config["qk_norm"]:
                shapes[f"{b}.attn.{part}_norm.weight"] = (c,)
                if flash:
                    shapes[f"{b}.attn.{part}_norm.bias"] = (c,)
            if config["cross_norm"]:
                shapes[f"{b}.cross_attn.{part}_norm.weight"] = (c,)
        if config.get("ffn_type") == "mlp":
            linear(f"{b}.mlp.fc1", m, c)
            linear(f"{b}.mlp.fc2", c, m)
        else:
            shapes[f"{b}.mlp.inverted_conv.conv.weight"] = (2 * m, c, 1, 1)
            shapes[f"{b}.mlp.inverted_conv.conv.bias"] = (2 * m,)
            shapes[f"{b}.mlp.depth_conv.conv.weight"] = (2 * m, 1, 3, 3)
            shapes[f"{b}.mlp.depth_conv.conv.bias"] = (2 * m,)
            shapes[f"{b}.mlp.point_conv.conv.weight"] = (c, m, 1, 1)
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "connector.3.weight")):
            return 1 + 0.2 * noise
        fan = math.prod(shape[1:]) if len(shape) > 1 and "table" not in name else 4
        return noise / math.sqrt(fan)

    return {name: value(name, shape) for name, shape in shapes.items()}


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A checkpoint directory as the release lays it out."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm over the last dimension, rounded before the weight is applied."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weight or bias."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def heads_of(x: Tensor, count: int) -> Tensor:
    """[B, N, C] -> [B, count, N, C / count]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class PlainDiT:
    """velocity() of a batch; pads of the condition are attended with a bias of -10,000."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def connect(self, condition: Tensor) -> Tensor:
        """condition [B, L, K] -> caption space [B, L, P]; the release does it once per image."""
        if not self.config["use_connector"]:
            return condition
        x = F.gelu(self.linear("diffusion_connector.0", condition), approximate="tanh")
        x = self.linear("diffusion_connector.2", x)
        return rms(x, self.tensors["diffusion_connector.3.weight"])

    def captions(self, tokens: Tensor) -> Tensor:
        """Caption space [B, L, P] -> what cross-attention reads, [B, L, C]."""
        x = F.gelu(self.linear("y_embedder.y_proj.fc1", tokens), approximate="tanh")
        y = self.linear("y_embedder.y_proj.fc2", x)
        return (
            rms(y, self.tensors["attention_y_norm.weight"]) if self.config.get("y_norm", 1) else y
        )

    def normed_pair(self, b: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of self-attention after their norms, if they have any."""
        if not self.config["qk_norm"]:
            return q, k
        out = []
        for part, x in (("q", q), ("k", k)):
            weight = self.tensors[f"{b}.attn.{part}_norm.weight"]
            bias = self.tensors.get(f"{b}.attn.{part}_norm.bias")
            out.append(
                rms(x, weight) if bias is None else F.layer_norm(x, x.shape[-1:], weight, bias)
            )
        return out[0], out[1]

    def self_attention(self, b: str, x: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{b}.attn.to_{part}", x) for part in "qkv")
        q, k = self.normed_pair(b, q, k)
        if self.config.get("attn_type") == "flash":
            q, k, v = (heads_of(t, self.config["num_heads"]) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            count = x.shape[-1] // self.config["linear_head_dim"]
            q, k, v = (heads_of(t, count).float() for t in (q.relu(), k.relu(), v))
            state = F.pad(v, (0, 1), value=1.0).transpose(-1, -2) @ k  # a row of ones below v
            mixed = q @ state.transpose(-1, -2)
            out = (mixed[..., :-1] / (mixed[..., -1:] + 1e-8)).to(x.dtype)
        return self.linear(f"{b}.attn.proj", out.transpose(1, 2).flatten(2))

    def cross_attention(self, b: str, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        q = self.linear(f"{b}.cross_attn.q_linear", x)
        k, v = self.linear(f"{b}.cross_attn.to_k", y), self.linear(f"{b}.cross_attn.to_v", y)
        if self.config["cross_norm"]:
            q = rms(q, self.tensors[f"{b}.cross_attn.q_norm.weight"])
            k = rms(k, self.tensors[f"{b}.cross_attn.k_norm.weight"])
        q, k, v = (heads_of(t, self.config["num_heads"]) for t in (q, k, v))
        if bias is not None:
            bias = bias.expand(-1, q.shape[1], q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.linear(f"{b}.cross_attn.proj", out.transpose(1, 2).flatten(2))

    def feed_forward(self, b: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.config.get("ffn_type") == "mlp":
            hidden = F.gelu(self.linear(f"{b}.mlp.fc1", x), approximate="tanh")
            return self.linear(f"{b}.mlp.fc2", hidden)
        kinds = {"silu": F.silu, "gelu": F.gelu, None: lambda t: t}
        first, gate, last = (kinds[a] for a in self.config.get("mlp_acts", ["silu", "silu", None]))
        planes = x.transpose(1, 2).unflatten(2, grid)
        for conv, pad, groups, act in (("inverted", 0, 1, first), ("depth", 1, None, None)):
            weight = self.tensors[f"{b}.mlp.{conv}_conv.conv.weight"]
            bias = self.tensors[f"{b}.mlp.{conv}_conv.conv.bias"]
            planes = F.conv2d(planes, weight, bias, padding=pad, groups=groups or len(weight))
            planes = act(planes) if act else planes
        a, g = planes.chunk(2, dim=1)
        out = F.conv2d(a * gate(g), self.tensors[f"{b}.mlp.point_conv.conv.weight"])
        return last(out).flatten(2).transpose(1, 2)

    def time(self, timestep: Tensor) -> Tensor:
        """Timesteps [B], truncated to integers -> [B, C]."""
        steps = torch.arange(128, dtype=torch.float32)
        angles = timestep.long().float()[:, None] * torch.exp(-math.log(10000) * steps / 128)
        wave = torch.cat((angles.cos(), angles.sin()), -1)
        wave = wave.to(self.tensors["t_embedder.mlp.0.weight"].dtype)
        return self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", wave)))

    def velocity(
        self, latent: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """latent [B, Cin, h, w], timestep [B], caption tokens [B, L, P], mask [B, L] of 1 and 0
        -> [B, Cin, h, w]."""
        config, side = self.config, self.config["patch_size"]
        weight = self.tensors["x_embedder.proj.weight"]
        latent = latent.to(weight.dtype)
        pad = side // 2 if side % 2 else 0
        cells = F.conv2d(
            latent, weight, self.tensors["x_embedder.proj.bias"], stride=side, padding=pad
        )
        grid = (cells.shape[2], cells.shape[3])
        x = cells.flatten(2).transpose(1, 2)
        time = self.time(timestep)
        shared = self.linear("t_block.1", F.silu(time)).unflatten(1, (6, -1))
        y = self.captions(tokens)
        bias = None if mask is None else ((1 - mask[:, None, None]) * -10000.0).to(x.dtype)
        for i in range(config["depth"]):
            b = f"blocks.{i}"
            table = self.tensors[f"{b}.scale_shift_table"] + shared
            mod = table.unsqueeze(2).unbind(1)
            x = x + mod[2] * self.self_attention(b, norm(x) * (1 + mod[1]) + mod[0])
            query = norm(x) if config.get("cross_attn_x_norm") else x
            x = x + self.cross_attention(b, query, y, bias)
            x = x + mod[5] * self.feed_forward(b, norm(x) * (1 + mod[4]) + mod[3], grid)
        final = self.tensors["final_layer.scale_shift_table"] + time.unsqueeze(1)
        shift, scale = final.unsqueeze(2).unbind(1)
        out = self.linear("final_layer.linear", norm(x) * (1 + scale) + shift)
        # fold() wants the channel outside the place in the patch, the model writes it inside.
        patches = out.unflatten(2, (side * side, -1)).transpose(2, 3).flatten(2).transpose(1, 2)
        size = (grid[0] * side, grid[1] * side)
        return F.fold(patches, size, side, stride=side)[:, : latent.shape[1]]
