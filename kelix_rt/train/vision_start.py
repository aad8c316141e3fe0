"""Where the visual tokenizer's training starts: random weights, with eyes for what is near.

A vision transformer that starts from plain random weights spends most of a short training on two
discoveries, so it is told both; training may change everything.

* Neighbouring patches belong together (as in ConViT, d'Ascoli et al. 2021): constant queries and
  keys, turned by the 2-D RoPE, make each head of the first layers look at one neighbour of a patch.
* Outlines matter more than brightness, which has hundreds of times their variance: the patch
  embedding starts as a whitening of patches (as in Coates & Ng 2012).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kelix_rt.config import TokenizerConfig, VisionConfig
from kelix_rt.models.vision_layers import VisionAttention
from kelix_rt.models.vision_tokenizer import VisionTokenizer

NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # (rows, columns) away, a head each
LOCAL_LAYERS = 2
LOCAL_STRENGTH = 5.0  # score of the neighbour per pair of channels used
LOCAL_CONTENT = 0.3  # what is left of the random queries and keys there
SLOWEST = 0.05  # radians per patch; slower pairs cannot tell neighbours apart
WHITE_SIZE = 1.5  # standard deviation of embedded patches


def new_vision_tokenizer(
    config: TokenizerConfig, device: torch.device | str, seed: int
) -> VisionTokenizer:
    """A tokenizer with random weights: normal by fan-in, residual branches scaled by their number.

    Its codebooks are not set: `SimVQ` has them while it is trained.
    """
    model = VisionTokenizer(config)
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * max(1, config.vision_config.num_hidden_layers)) ** -0.5
    for name, parameter in model.named_parameters():
        if name == "z_weight" or (parameter.dim() < 2 and name.endswith("weight")):
            nn.init.ones_(parameter)
        elif name == "z_bias" or parameter.dim() < 2:
            nn.init.zeros_(parameter)
        else:
            # Positions as large as patches: they alone tell apart patches of one plain colour.
            std = 0.3 if name == "positions" else parameter.shape[-1] ** -0.5
            if name.endswith(("attention.output.weight", "down.weight")):
                std *= depth
            if name == "up_projectors":
                std *= config.n_q_tokens**-0.5  # the fan-in is that of all sub-codebooks
            nn.init.normal_(parameter, std=std, generator=generator)
    for layer in list(model.layers)[:LOCAL_LAYERS]:
        attention = layer.attention
        assert isinstance(attention, VisionAttention)
        _look_at_neighbours(attention, config.vision_config, 1 / depth)
    return model.to(device)


@torch.no_grad()
def whiten_patches(model: VisionTokenizer, patches: Tensor, seed: int) -> None:
    """Starts the patch embedding as a random rotation of the patches' whitened main components.

    patches: [n, 3, P, P] of training pictures, n well above the embedding's width.
    """
    flat = patches.flatten(1)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).t() @ (flat - mean) / len(flat))
    width = len(model.patch_embedding.weight)
    values, vectors = values[-width:].clamp(min=1e-6), vectors[:, -width:]
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator)).Q
    weight = WHITE_SIZE * turn.to(flat.device) @ (vectors * values.rsqrt()).t()
    model.patch_embedding.weight[: len(weight)] = weight
    model.patch_embedding.bias[: len(weight)] = -weight @ mean


@torch.no_grad()
def _look_at_neighbours(attention: VisionAttention, config: VisionConfig, gain: float) -> None:
    """Starts every head with its attention on one neighbour. gain: of the output's weights."""
    queries, keys = zip(
        *(
            _constant_query_and_key(NEIGHBOURS[head % len(NEIGHBOURS)], config)
            for head in range(attention.heads)
        ),
        strict=True,
    )
    rows = attention.heads * attention.head_dim
    attention.qkv.weight[: 2 * rows] *= LOCAL_CONTENT
    attention.qkv.bias[:rows] = torch.cat(queries)
    attention.qkv.bias[rows : 2 * rows] = torch.cat(keys)
    attention.output.weight *= gain


def _constant_query_and_key(offset: tuple[int, int], config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Query and key [head_dim] whose score is highest for a key `offset` away from the query.

    RoPE turns a pair of channels by position times frequency, so the score of constants is the sum
    of cos(frequency * (distance - offset)) when the key is turned back by the offset.
    """
    pairs = config.head_dim // 4
    frequencies = config.rope_theta ** (-torch.arange(pairs) * 4 / config.head_dim)
    angles = torch.cat([distance * frequencies for distance in offset])
    used = (frequencies >= SLOWEST).float().repeat(2)
    size = used * (LOCAL_STRENGTH * config.head_dim**0.5) ** 0.5
    query = torch.cat((size, torch.zeros_like(size)))
    return query, torch.cat((size * angles.cos(), -size * angles.sin()))
