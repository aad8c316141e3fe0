"""Where the language model's training starts: random weights that can already copy and compare.

The report starts from a pretrained Qwen3. A model that starts from plain random weights spends most
of a short training on finding out how to look something up, so it is told; training may change
everything.

* Like looks at like: the queries of a head start close to its keys, its output as the way back from
  its values, and the output head as the embedding table (mimetic initialisation, Trockman & Kolter
  2023).
* Words belong to those in front of them: constant queries and keys, turned by RoPE, make the heads
  of the first group look one, two, three ... positions back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kelix_rt.config import KelixConfig
from kelix_rt.models.backbone import Attention, DecoderLayer
from kelix_rt.models.language_model import KelixLM

EMBEDDING_STD = 0.05
LOCAL_CONTENT = 0.3  # what is left of the random queries and keys of heads that look back
LOCAL_SIZE = 3.0  # of constant queries and keys, beside content of about LOCAL_CONTENT
SHARPNESS = 1.3  # weight of the norms of queries and keys
ALIKE = 0.8  # share of a head's keys in its queries
COPIED = 0.5  # share of the way back from the values in a head's output
SLOWEST = 0.05  # radians per position; slower pairs of channels tell no places apart
FAST, SLOW = 0.3, 1.5  # size of contents in the pairs that tell places apart, and in the others


def new_language_model(config: KelixConfig, device: torch.device | str, seed: int) -> KelixLM:
    """A model with random weights: normal by fan-in, residual branches scaled by their number."""
    model = KelixLM(config)
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * config.qwen_config.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if "biases" in name or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name or parameter.dim() < 2:
            nn.init.ones_(parameter)
        else:
            std = parameter.shape[1] ** -0.5
            if name == "embeddings" or "position_embedding" in name:
                std = EMBEDDING_STD
            elif name.endswith(("output.weight", "down.weight", "output_linear.weight")):
                std *= depth
            nn.init.normal_(parameter, std=std, generator=generator)
    _look_up(model)
    model = model.to(device)
    model.prepare()
    return model


@torch.no_grad()
def _look_up(model: KelixLM) -> None:
    model.head.copy_(model.embeddings * (model.embeddings.shape[1] ** -0.5 / EMBEDDING_STD))
    qwen = model.config.qwen_config
    frequencies = qwen.rope_base ** (-torch.arange(0, qwen.head_dim, 2) / qwen.head_dim)
    for layer in model.backbone.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.attention
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None:
                norm.fill_(SHARPNESS)
        _copy(attention)
        looks_back = {"q", "k"} <= set(attention.biases)
        if looks_back:
            _look_back(attention, frequencies)
        _compare(attention, frequencies, first_group=int(looks_back))


def _heads(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the weights of queries [G, H / G, hd, D], keys [G, hd, D] and values [G, hd, D]."""
    q, k, v = attention.qkv.weight.split(attention.sizes)
    groups = len(k) // attention.head_dim
    shape = (groups, attention.head_dim, q.shape[1])
    return q.view(groups, -1, *shape[1:]), k.view(shape), v.view(shape)


def _compare(attention: Attention, frequencies: Tensor, first_group: int) -> None:
    """Queries close to the keys of their group, both mostly in the pairs that RoPE hardly turns."""
    queries, keys, _ = (part[first_group:] for part in _heads(attention))
    size = torch.where(frequencies >= SLOWEST, FAST, SLOW).repeat(2).unsqueeze(1)
    keys *= size
    queries *= size * (1 - ALIKE**2) ** 0.5
    queries += ALIKE * keys.unsqueeze(1)


def _copy(attention: Attention) -> None:
    """Outputs near the transpose of the values: what a head sees is written as it was read."""
    _, _, values = _heads(attention)
    output = attention.output.weight.view(-1, attention.num_heads, attention.head_dim)
    shared = attention.num_heads // len(values)
    back = values.repeat_interleave(shared, dim=0).permute(2, 0, 1)
    output.mul_(1 - COPIED).add_(COPIED * back)


def _look_back(attention: Attention, frequencies: Tensor) -> None:
    """Head i of the first group starts with its attention i + 1 positions back.

    The score of a constant query and key is the sum of cos(frequency * (distance - i - 1)) over the
    pairs used.
    """
    queries, keys, _ = _heads(attention)
    used = (frequencies >= SLOWEST).float()
    used *= LOCAL_SIZE * (attention.head_dim / used.sum()) ** 0.5
    constants = []
    for head in range(len(queries[0])):
        angles = (head + 1) * frequencies
        constants.append(torch.cat((used * angles.cos(), -used * angles.sin())))
    queries[0] *= LOCAL_CONTENT
    keys[0] *= LOCAL_CONTENT
    attention.biases["q"][: len(constants) * attention.head_dim] = torch.cat(constants)
    attention.biases["k"][: attention.head_dim] = torch.cat((used, torch.zeros_like(used)))
