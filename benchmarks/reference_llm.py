"""The released generation algorithm in plain torch, step for step, as the thing to beat.

Not a strawman: float32 matmuls are torch's own, the backbone has its KV cache. What the release
wastes is what makes it slow, and it is all here: the Block Decoder has no KV cache, the final norm
and the whole head run on every slot of every inner step, prompts run them on every position, and a
block's logits are sorted, filtered and drawn over the full vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ReferenceLM:
    """Kelix-LLM, batch 1, from a state dict with the released names."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.qwen = config["qwen_config"]
        self.decoder = config["token_decoder_config"]
        self.w = {name.removeprefix("model.model."): t for name, t in tensors.items()}
        self.table = self.w["tok_embeddings.embed_tokens.weight"]
        self.block_end = self.qwen["q_eos_token"]
        self.num_codes = self.qwen["n_q_tokens"]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reset(self) -> None:
        """Forget the context."""
        self.keys, self.values = [], []

    def embed(self, ids: Tensor) -> Tensor:
        """Sum of the ids before end-of-block. ids: [S, N+1] -> [S, D]."""
        before_end = (ids == self.block_end).int().cumsum(-1) == 0
        visual = ids[:, :1] >= self.qwen["vocab_size"]
        looked_up = torch.where(visual, ids, ids[:, :1])
        return (self.table[looked_up] * before_end.unsqueeze(-1)).sum(1)

    def rms(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm with a stored scale."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w[name]

    def rope(self, x: Tensor, start: int) -> Tensor:
        """Half-split rotary embedding, [S, H, hd] from position `start` on."""
        dim = x.shape[-1]
        frequency = self.qwen["rope_base"] ** (-torch.arange(0, dim, 2).float() / dim)
        angle = torch.arange(start, start + x.shape[0]).float()[:, None] * frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def backbone(self, ids: Tensor) -> Tensor:
        """Hidden states of new rows, [S, D], appended to the KV cache."""
        h = self.embed(ids)
        rows, heads, kv_heads = ids.shape[0], self.qwen["num_heads"], self.qwen["num_kv_heads"]
        for layer in range(self.qwen["num_layers"]):
            p = f"layers.{layer}"
            x = self.rms(h, f"{p}.sa_norm.scale")
            q, k, v = (
                F.linear(x, self.w[f"{p}.attn.{n}_proj.weight"]).unflatten(
                    -1, (-1, self.qwen["head_dim"])
                )
                for n in "qkv"
            )
            start = self.keys[layer].shape[0] if layer < len(self.keys) else 0
            q = self.rope(self.rms(q, f"{p}.attn.q_norm.scale"), start)
            k = self.rope(self.rms(k, f"{p}.attn.k_norm.scale"), start)
            if start:
                k, v = torch.cat((self.keys[layer], k)), torch.cat((self.values[layer], v))
                self.keys[layer], self.values[layer] = k, v
            else:
                self.keys.append(k)
                self.values.append(v)
            wide_k = k.repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
            wide_v = v.repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
            scores = q.transpose(0, 1) @ wide_k.transpose(1, 2) * q.shape[-1] ** -0.5
            mask = torch.ones(rows, k.shape[0], dtype=torch.bool).tril(start)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            out = (weights @ wide_v).transpose(0, 1).flatten(1)
            h = h + F.linear(out, self.w[f"{p}.attn.output_proj.weight"])
            y = self.rms(h, f"{p}.mlp_norm.scale")
            gate = F.silu(F.linear(y, self.w[f"{p}.mlp.w1.weight"]))
            up = F.linear(y, self.w[f"{p}.mlp.w3.weight"])
            h = h + F.linear(gate * up, self.w[f"{p}.mlp.w2.weight"])
        return h

    def token_head(self, u: Tensor) -> Tensor:
        """Block Decoder without cache. u: [S, n, D] -> logits [S, n, VT]."""
        w, heads = self.w, self.decoder["nhead"]
        x = F.linear(u, w["token_head.input_linear.weight"], w["token_head.input_linear.bias"])
        x = x + w["token_head.position_embedding.weight"][: u.shape[1]]
        for layer in range(self.decoder["num_layers"]):
            p = f"token_head.transformer.layers.{layer}"

            def linear(y: Tensor, name: str, p: str = p) -> Tensor:
                return F.linear(y, w[f"{p}.{name}.weight"], w.get(f"{p}.{name}.bias"))

            y = F.layer_norm(x, x.shape[-1:], w[f"{p}.sa_norm.weight"], w[f"{p}.sa_norm.bias"])
            q, k, v = (
                linear(y, f"attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
                for n in "qkv"
            )
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(a.transpose(1, 2).flatten(2), "attn.output_proj")
            y = F.layer_norm(x, x.shape[-1:], w[f"{p}.mlp_norm.weight"], w[f"{p}.mlp_norm.bias"])
            x = x + linear(F.silu(linear(y, "mlp.w1")) * linear(y, "mlp.w3"), "mlp.w2")
        z = F.linear(x, w["token_head.output_linear.weight"], w["token_head.output_linear.bias"])
        return F.linear(self.rms(z + u, "norm.scale"), w["output.weight"])

    def next_block(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Greedy inner loop over all rows of h [S, D]; logits of the last row [k, VT], its ids."""
        u = h.unsqueeze(1)
        logits: list[Tensor] = []
        ids: list[Tensor] = []
        for step in range(self.num_codes + 1):
            if step + 1 >= self.decoder["max_length"]:
                break
            out = self.token_head(u)
            picked = out[:, -1].argmax(-1)
            logits.append(out[-1, -1])
            ids.append(picked[-1])
            u = torch.cat((u, self.table[picked].unsqueeze(1)), 1)
            if picked[-1] == self.block_end:
                break
        return torch.stack(logits), torch.stack(ids)

    def draw(self, logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
        """The release's independent re-draw of every slot, [N + 1]."""
        rows = torch.full((self.num_codes + 1, logits.shape[1]), float(self.block_end))
        rows[: logits.shape[0]] = logits
        if temperature > 0:
            rows = rows / (temperature + 1e-5)
        if top_k > 0:
            kth = rows.topk(top_k, -1).values[:, -1:]
            rows = rows.masked_fill(rows < kth, -torch.inf)
        if top_p < 1:
            ordered, order = rows.sort(-1, descending=True)
            dropped = ordered.softmax(-1).cumsum(-1) > top_p
            dropped[:, 0] = False
            rows = rows.masked_fill(
                torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf
            )
        ids = torch.multinomial(rows.softmax(-1), 1).squeeze(1)
        ids[-1] = self.block_end
        ended = (ids == self.block_end).int().cumsum(0) > 0
        return torch.where(ended, self.block_end, ids)

    def step(
        self, ids: Tensor, temperature: float = 0.7, top_k: int = 1, top_p: float = 0.9
    ) -> Tensor:
        """Feed rows [S, N+1] and return the next block [N+1]."""
        logits, _ = self.next_block(self.backbone(ids))
        return self.draw(logits, temperature, top_k, top_p)
