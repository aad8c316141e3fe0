"""A vision tokenizer written plainly in float64, and random checkpoints for it.

Straight from the architecture's description (NaViT, SimVQ), one image and one head at a time; it
shares no code with the package.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Config = dict[str, Any]

QUIET = 2e-3  # rows this small make the eps of a norm visible


def make_config(vision: Config | None = None, **options: Any) -> Config:
    """A tiny tokenizer config.json; `vision` and `options` override fields."""
    base = {
        "vision_config": {
            "image_size": 42, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 40, "hidden_act": "gelu_pytorch_tanh",
            "rope_theta": 100.0,
        },
        "codebook_size": 48, "embedding_dim": 8, "init_embedding_dim": 12, "llm_hidden_size": 20,
        "n_q_tokens": 4, "split_voc": 4, "output_dim": 10, "__class__": "KeyeTokenizerConfig",
    }  # fmt: skip
    return {**base, **options, "vision_config": {**base["vision_config"], **(vision or {})}}


def make_state(config: Config, seed: int = 0) -> State:
    """Random tensors by their stored names; every norm sees rows of about the size of QUIET."""
    generator = torch.Generator().manual_seed(seed)
    vision = config["vision_config"]
    width, inner, raw = vision["hidden_size"], vision["intermediate_size"], 12
    state: State = {}

    def tensor(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        state[name] = torch.randn(*shape, generator=generator) * scale + shift

    def linear(name: str, out: int, inputs: int, gain: float) -> None:
        tensor(f"{name}.weight", out, inputs, scale=gain / math.sqrt(inputs))
        tensor(f"{name}.bias", out, scale=gain / 4)

    def norm(name: str, size: int, scale: float = 1.0) -> None:
        tensor(f"{name}.weight", size, scale=scale / 4, shift=scale)
        tensor(f"{name}.bias", size, scale=scale / 4)

    embeddings = "visual.embeddings"
    linear(f"{embeddings}.patch_embedding", width, 588, QUIET)
    patches = state[f"{embeddings}.patch_embedding.weight"]
    state[f"{embeddings}.patch_embedding.weight"] = patches.view(width, 3, 14, 14)
    if vision.get("has_learnable_position_embedding", True):
        tensor(f"{embeddings}.position_embedding.weight", 9, width, scale=QUIET)
    for layer in range(vision["num_hidden_layers"]):
        start = f"visual.encoder.layers.{layer}"
        norm(f"{start}.sa_norm", width)
        norm(f"{start}.mlp_norm", width)
        for name in "qkv":
            gain = 0.05 if vision.get("use_qk_norm") else 2.0
            linear(f"{start}.attn.{name}_proj", width, width, gain)
        linear(f"{start}.attn.output_proj", width, width, QUIET)
        linear(f"{start}.mlp.w1", inner, width, 1.0)
        linear(f"{start}.mlp.w2", width, inner, QUIET)
        if vision.get("use_qk_norm"):
            for name in "qk":
                tensor(f"{start}.attn.{name}_norm.scale", width // 2, scale=0.3, shift=2.0)
    norm("visual.ln_post", width, QUIET)
    norm("mlp_AR.pre_norm", 4 * width)
    linear("mlp_AR.linear_1", 4 * width, 4 * width, 1.0)
    linear("mlp_AR.linear_2", config["llm_hidden_size"], 4 * width, 1.0)
    if config.get("pre_llm_align"):
        linear("pre_llm_aligner", config["llm_hidden_size"], config["llm_hidden_size"], 1.0)
    books, total = config["n_q_tokens"], config["codebook_size"]
    code = config["embedding_dim"] // (books if config.get("split_dim") else 1)
    linear("encoder", books * code, config["llm_hidden_size"], 2 * QUIET)
    for book in range(books):
        start = f"quantizer.{book}"
        tensor(f"{start}.embedding.weight", total, raw)
        if config.get("add_voc_reducer"):
            tensor(f"{start}.voc_reducer", total, total // max(config["split_voc"], 1), scale=0.1)
        linear(f"{start}.embedding_proj", code, raw, QUIET)
        norm(f"{start}.q_norm", code)
        norm(f"{start}.z_norm", code)
        tensor(f"up_projectors.{book}.weight", config["output_dim"], code)
    return state


def save_checkpoint(directory: Path, config: Config, state: State) -> Path:
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()},
              str(directory / "model.safetensors"))  # fmt: skip
    return directory


class PlainTokenizer:
    """The same computation in float64."""

    def __init__(self, config: Config, state: State) -> None:
        self.config, self.vision = config, config["vision_config"]
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.eps = self.vision.get("layer_norm_eps", 1e-6)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def gelu(self, x: Tensor, kind: str) -> Tensor:
        if kind == "silu":
            return x * torch.sigmoid(x)
        if kind == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(cubic))

    def embed(self, pixels: Tensor, grids: list[list[int]]) -> Tensor:
        weight = self.state["visual.embeddings.patch_embedding.weight"].flatten(1)
        x = pixels.double().flatten(1) @ weight.T
        x = x + self.state["visual.embeddings.patch_embedding.bias"]
        table = self.state.get("visual.embeddings.position_embedding.weight")
        if table is None:
            return x
        return x + torch.cat([self.positions(table, h, w).repeat(t, 1) for t, h, w in grids])

    def positions(self, table: Tensor, rows: int, columns: int) -> Tensor:
        side = round(math.sqrt(len(table)))

        def taps(count: int, index: int) -> tuple[int, int, float]:
            source = max(0.0, (index + 0.5) * side / count - 0.5)
            low = int(source)
            return low, min(low + 1, side - 1), source - low

        out = []
        for r in range(rows):
            r0, r1, wr = taps(rows, r)
            for c in range(columns):
                c0, c1, wc = taps(columns, c)
                top = table[r0 * side + c0] * (1 - wc) + table[r0 * side + c1] * wc
                bottom = table[r1 * side + c0] * (1 - wc) + table[r1 * side + c1] * wc
                out.append(top * (1 - wr) + bottom * wr)
        return torch.stack(out)

    def rotate(self, x: Tensor, grid: list[int]) -> Tensor:
        """x: [N, hd] of one head."""
        half = x.shape[1] // 2
        out = torch.empty_like(x)
        for index in range(len(x)):
            cell = index % (grid[1] * grid[2])
            place = (cell // grid[2], cell % grid[2])
            for j in range(half):
                axis, k = divmod(j, half // 2)
                angle = place[axis] / self.vision["rope_theta"] ** (2 * k / half)
                cos, sin = math.cos(angle), math.sin(angle)
                out[index, j] = x[index, j] * cos - x[index, j + half] * sin
                out[index, j + half] = x[index, j + half] * cos + x[index, j] * sin
        return out

    def attend(self, x: Tensor, name: str, grid: list[int]) -> Tensor:
        heads = self.vision["num_attention_heads"]
        q, k, v = (self.linear(x, f"{name}.{n}_proj").chunk(heads, -1) for n in "qkv")
        out = []
        for a, b, c in zip(q, k, v, strict=True):
            a, b = self.rotate(a, grid), self.rotate(b, grid)  # noqa: PLW2901
            if self.vision.get("use_qk_norm"):
                eps = self.vision["qk_norm_eps"]
                a, b = (  # noqa: PLW2901
                    y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
                    * self.state[f"{name}.{n}_norm.scale"]
                    for y, n in ((a, "q"), (b, "k"))
                )  # fmt: skip
            out.append(torch.softmax(a @ b.T / math.sqrt(a.shape[1]), -1) @ c)
        return self.linear(torch.cat(out, -1), f"{name}.output_proj")

    def hidden(self, pixels: Tensor, grids: list[list[int]]) -> Tensor:
        """[N, D] after the last norm."""
        lengths = [t * h * w for t, h, w in grids]
        images = self.embed(pixels, grids).split(lengths)
        return torch.cat([self.image(x, grid) for x, grid in zip(images, grids, strict=True)])

    def image(self, x: Tensor, grid: list[int]) -> Tensor:
        for layer in range(self.vision["num_hidden_layers"]):
            start = f"visual.encoder.layers.{layer}"
            x = x + self.attend(self.norm(x, f"{start}.sa_norm", self.eps), f"{start}.attn", grid)
            y = self.linear(self.norm(x, f"{start}.mlp_norm", self.eps), f"{start}.mlp.w1")
            x = x + self.linear(self.gelu(y, self.vision["hidden_act"]), f"{start}.mlp.w2")
        return self.norm(x, "visual.ln_post", self.eps)

    def merged(self, hidden: Tensor, grids: list[list[int]]) -> Tensor:
        """[T, E] after the merger."""
        tokens, start = [], 0
        for t, h, w in grids:
            for frame in range(t):
                for r in range(0, h, 2):
                    for c in range(0, w, 2):
                        at = start + frame * h * w + r * w + c
                        places = (at, at + 1, at + w, at + w + 1)
                        tokens.append(torch.cat([hidden[place] for place in places]))
            start += t * h * w
        y = self.norm(torch.stack(tokens), "mlp_AR.pre_norm", 1e-5)
        return self.linear(self.gelu(self.linear(y, "mlp_AR.linear_1"), "gelu"), "mlp_AR.linear_2")

    def codebook(self, book: int) -> Tensor:
        """[K, d] of one quantizer."""
        start, split = f"quantizer.{book}", max(self.config["split_voc"], 1)
        table = self.state[f"{start}.embedding.weight"]
        size = self.config["codebook_size"] // split
        if self.config.get("add_voc_reducer"):
            table = self.state[f"{start}.voc_reducer"].T @ table
        elif split > 1:
            table = table[size * book : size * (book + 1)]
        return self.norm(self.linear(table, f"{start}.embedding_proj"), f"{start}.q_norm", 1e-5)

    def normed(self, merged: Tensor) -> list[Tensor]:
        """[T, d] per quantizer: what is compared with the codes."""
        if self.config.get("pre_llm_align"):
            merged = self.linear(merged, "pre_llm_aligner")
        parts = self.linear(merged, "encoder").chunk(self.config["n_q_tokens"], -1)
        return [self.norm(z, f"quantizer.{i}.z_norm", 1e-5) for i, z in enumerate(parts)]

    def codes(self, pixels: Tensor, grids: list[list[int]]) -> Tensor:
        """[T, N] int64."""
        normed = self.normed(self.merged(self.hidden(pixels, grids), grids))
        books = [torch.cdist(z, self.codebook(i)).argmin(-1) for i, z in enumerate(normed)]
        return torch.stack(books, -1)

    def fused(self, codes: Tensor) -> Tensor:
        """[T, O]: codes -> embeddings."""
        parts = [
            self.codebook(i)[codes[:, i]] @ self.state[f"up_projectors.{i}.weight"].T
            for i in range(codes.shape[1])
        ]
        total = torch.stack(parts).sum(0)
        return total / len(parts) if self.config.get("fusion_type") == "mean" else total
