"""A small random language model on disk, and its forward pass in plain float64 torch.

The plain pass is written from the model's equations alone: no fusion, no cache, no kelix_rt code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

V, N, K, D = 48, 3, 8, 24
TOTAL = V + N * K
EOS, VISION_START, VISION_END, IMAGE, Q = 40, 41, 42, 43, 44
State = dict[str, Tensor]


def config_json(
    qwen: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of the toy model; the arguments override fields."""
    return {
        "model_class": "KeyeARModel",
        "qwen_config": {
            "model_class": "UnifiedQwen3Model",
            "vocab_size": V,
            "embed_dim": D,
            "num_layers": 2,
            "tie_word_embeddings": False,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "intermediate_dim": 40,
            "max_seq_len": 64,
            "rope_base": 500.0,
            "norm_eps": 1e-5,
            "eos_token_id": EOS,
            "image_token_id": IMAGE,
            "q_eos_token": Q,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "codebook_size": N * K,
            "n_q_tokens": N,
            **(qwen or {}),
        },
        "tokenizer_config": {
            "vision_config": {"model_class": "KeyeVisionModel"},
            "codebook_size": N * K,
            "n_q_tokens": N,
            "split_voc": N,
        },
        "token_decoder_config": {
            "max_pos_length": 12,
            "max_length": 9,
            "d_model": 20,
            "eos_token": Q,
            "nhead": 2,
            "num_layers": 2,
            "dim_feedforward": 28,
            "input_dim": D,
            **(decoder or {}),
        },
        "__class__": "KeyeARConfig",
    }


def random_state(config: dict[str, Any], seed: int = 0) -> State:
    """Random float32 tensors under the release's names."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    def around_one(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    qwen, decoder = config["qwen_config"], config["token_decoder_config"]
    rows = {
        "q": qwen["num_heads"] * qwen["head_dim"],
        "k": qwen["num_kv_heads"] * qwen["head_dim"],
        "v": qwen["num_kv_heads"] * qwen["head_dim"],
    }
    state = {
        "model.model.tok_embeddings.embed_tokens.weight": torch.randn(
            TOTAL, D, generator=generator
        ),
        "model.model.output.weight": weight(TOTAL, D) * 4,
        "model.model.norm.scale": around_one(D),
    }
    for index in range(qwen["num_layers"]):
        layer = f"model.model.layers.{index}."
        for name, size in rows.items():
            state[f"{layer}attn.{name}_proj.weight"] = weight(size, D)
            if qwen.get(f"{name}_proj_bias"):
                state[f"{layer}attn.{name}_proj.bias"] = torch.randn(size, generator=generator)
            if name != "v" and qwen.get(f"{name}_norm", True):
                state[f"{layer}attn.{name}_norm.scale"] = around_one(qwen["head_dim"])
        state[f"{layer}attn.output_proj.weight"] = weight(D, rows["q"])
        state[f"{layer}sa_norm.scale"] = around_one(D)
        state[f"{layer}mlp_norm.scale"] = around_one(D)
        ffn = qwen["intermediate_dim"]
        state[f"{layer}mlp.w1.weight"] = weight(ffn, D)
        state[f"{layer}mlp.w3.weight"] = weight(ffn, D)
        state[f"{layer}mlp.w2.weight"] = weight(D, ffn)
    head, d, ffn = "model.model.token_head.", decoder["d_model"], decoder["dim_feedforward"]
    state[head + "position_embedding.weight"] = weight(decoder["max_pos_length"], d)
    for name, shape in (("input_linear", (d, D)), ("output_linear", (D, d))):
        state[f"{head}{name}.weight"] = weight(*shape)
        state[f"{head}{name}.bias"] = weight(shape[0])
    for index in range(decoder["num_layers"]):
        layer = f"{head}transformer.layers.{index}."
        for name in ("sa_norm", "mlp_norm"):
            state[f"{layer}{name}.weight"] = around_one(d)
            state[f"{layer}{name}.bias"] = weight(d)
        for name in ("q", "k", "v", "output"):
            state[f"{layer}attn.{name}_proj.weight"] = weight(d, d)
            state[f"{layer}attn.{name}_proj.bias"] = weight(d)
        state[f"{layer}mlp.w1.weight"] = weight(ffn, d)
        state[f"{layer}mlp.w3.weight"] = weight(ffn, d)
        state[f"{layer}mlp.w2.weight"] = weight(d, ffn)
    return state


def write(path: Path, config: dict[str, Any], state: State) -> Path:
    """Writes a checkpoint directory and returns it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors")
    return path


def text(*ids: int) -> Tensor:
    """Text blocks."""
    return torch.tensor([[i] + [Q] * N for i in ids])


def image(*codes: tuple[int, ...]) -> Tensor:
    """Visual blocks of local codes, one tuple of N per block."""
    return torch.tensor([[V + j * K + c for j, c in enumerate(row)] + [Q] for row in codes])


class PlainLM:
    """Forward passes in float64, straight from the equations."""

    def __init__(self, config: dict[str, Any], state: State) -> None:
        self.qwen, self.decoder = config["qwen_config"], config["token_decoder_config"]
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.table = self.state["model.model.tok_embeddings.embed_tokens.weight"]

    def rms(self, x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.qwen["norm_eps"]).sqrt() * scale

    def embed(self, ids: Tensor) -> Tensor:
        rows = []
        for row in ids.tolist():
            count = row.index(Q) if Q in row else N
            used = row[: min(count, N)] if row[0] >= V else [row[0]] * min(count, N)
            rows.append(self.table[torch.tensor(used, dtype=torch.int64)].sum(0))
        return torch.stack(rows)

    def _heads(self, layer: str, name: str, x: Tensor, count: int) -> Tensor:
        y = x @ self.state[f"{layer}attn.{name}_proj.weight"].t()
        bias = self.state.get(f"{layer}attn.{name}_proj.bias")
        y = (y if bias is None else y + bias).view(len(x), count, -1)
        scale = self.state.get(f"{layer}attn.{name}_norm.scale")
        y = (y if scale is None else self.rms(y, scale)).transpose(0, 1)
        return y if name == "v" else self._rope(y)

    def _rope(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        out = torch.empty_like(x)
        for position in range(x.shape[1]):
            for i in range(half):
                angle = torch.tensor(
                    position * self.qwen["rope_base"] ** (-i / half), dtype=torch.float64
                )
                a, b = x[:, position, i], x[:, position, half + i]
                out[:, position, i] = a * angle.cos() - b * angle.sin()
                out[:, position, half + i] = b * angle.cos() + a * angle.sin()
        return out

    def hidden(self, ids: Tensor) -> Tensor:
        """[S, N+1] -> [S, D] after the last layer."""
        h = self.embed(ids)
        heads, kv_heads = self.qwen["num_heads"], self.qwen["num_kv_heads"]
        for index in range(self.qwen["num_layers"]):
            layer = f"model.model.layers.{index}."
            x = self.rms(h, self.state[layer + "sa_norm.scale"])
            q = self._heads(layer, "q", x, heads)
            k = self._heads(layer, "k", x, kv_heads).repeat_interleave(heads // kv_heads, 0)
            v = self._heads(layer, "v", x, kv_heads).repeat_interleave(heads // kv_heads, 0)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            joined = mixed.transpose(0, 1).reshape(len(h), -1)
            h = h + joined @ self.state[layer + "attn.output_proj.weight"].t()
            y = self.rms(h, self.state[layer + "mlp_norm.scale"])
            h = h + self._swiglu(layer, y)
        return h

    def _swiglu(self, layer: str, x: Tensor) -> Tensor:
        gate, up, down = (self.state[f"{layer}mlp.w{i}.weight"] for i in (1, 3, 2))
        return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    def decoder_states(self, inputs: Tensor) -> Tensor:
        """One slot sequence [n, D] -> [n, D]."""
        root, heads = "model.model.token_head.", self.decoder["nhead"]

        def linear(name: str, x: Tensor) -> Tensor:
            return x @ self.state[f"{name}.weight"].t() + self.state[f"{name}.bias"]

        def norm(name: str, x: Tensor) -> Tensor:
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

        x = linear(root + "input_linear", inputs)
        x = x + self.state[root + "position_embedding.weight"][: len(x)]
        for index in range(self.decoder["num_layers"]):
            layer = f"{root}transformer.layers.{index}."
            y = norm(layer + "sa_norm", x)
            q, k, v = (
                linear(f"{layer}attn.{n}_proj", y).view(len(x), heads, -1).transpose(0, 1)
                for n in "qkv"
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            joined = mixed.transpose(0, 1).reshape(len(x), -1)
            x = x + linear(f"{layer}attn.output_proj", joined)
            x = x + self._swiglu(layer, norm(layer + "mlp_norm", x))
        return linear(root + "output_linear", x) + inputs

    def slot_logits(self, hidden: Tensor, previous: list[int]) -> Tensor:
        """Whole-vocabulary logits [VT] of the slot after `previous`, for one state [D]."""
        inputs = torch.stack([hidden, *(self.table[i] for i in previous)])
        normed = self.rms(self.decoder_states(inputs)[-1], self.state["model.model.norm.scale"])
        return self.state["model.model.output.weight"] @ normed

    def greedy_block(self, hidden: Tensor) -> list[int]:
        """The greedy well-formed block of one state [D]."""
        logits = self.slot_logits(hidden, [])
        logits[IMAGE] = -torch.inf
        ids = [int(logits[: V + K].argmax())]
        if ids[0] >= V:
            for j in range(1, N):
                first = V + j * K
                slice_logits = self.slot_logits(hidden, ids)[first : first + K]
                ids.append(first + int(slice_logits.argmax()))
        return ids + [Q] * (N + 1 - len(ids))
