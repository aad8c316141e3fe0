"""The quantizer as it is trained: frozen centres, trained projections (SimVQ, Zhu et al. 2024).

`VisionTokenizer` keeps only the projected codebooks; this module holds what they are made from,
under the names of the released checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.config import TokenizerConfig
from kelix_rt.errors import ConfigError
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.models.vision_weights import CODE_EPS
from kelix_rt.train.kmeans import kmeans

COMMITMENT = 0.25  # beta, the weight of the loss that draws features to their codes


@dataclass(frozen=True)
class Quantized:
    """codes: int64 [T, N]. vectors: [T, N, d], the codes forwards, the features backwards.
    loss: the VQ loss, a scalar. features: [T, N, d], what was compared with the codes."""

    codes: Tensor
    vectors: Tensor
    loss: Tensor
    features: Tensor

    def twin_loss(self, twins: Tensor) -> Tensor:
        """Mean squared distance of features from the codes of their twins.

        twins: int64 [m, 2], pairs of tokens that should have the same codes.
        """
        one, other = twins.unbind(1)
        codes = self.vectors.detach()
        return F.mse_loss(self.features[one], codes[other]) + F.mse_loss(
            self.features[other], codes[one]
        )


class SimVQ(nn.Module):
    """N sub-codebooks of K codes: ``C = LayerNorm(centres W^T + b)`` with frozen centres.

    Raises ConfigError for options that do not give each quantizer a block of centres of its own.
    """

    centres: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        if config.add_voc_reducer or config.split_voc != config.n_q_tokens:
            raise ConfigError(
                "SimVQ: split_voc must equal n_q_tokens, without add_voc_reducer, got "
                f"{config.split_voc} and {config.n_q_tokens}"
            )
        self.config = config
        books, width, raw = config.n_q_tokens, config.code_dim, config.init_embedding_dim
        self.register_buffer("centres", torch.zeros(books, config.codes_per_book, raw))
        self.weight = nn.Parameter(torch.zeros(books, width, raw))
        self.bias = nn.Parameter(torch.zeros(books, width))
        self.norm_weight = nn.Parameter(torch.ones(books, width))
        self.norm_bias = nn.Parameter(torch.zeros(books, width))

    @torch.no_grad()
    def start(self, features: Tensor, model: VisionTokenizer, seed: int = 0) -> None:
        """Centres by K-means over features [M, E] in front of the model's encoder projection.

        The S centres are dealt at random to the N sub-codebooks. The projections start as the
        model's own, so that a code begins as what the model makes of a patch that is a centre.
        Raises ConfigError unless centres have the width of the features.
        """
        config = self.config
        if features.shape[1] != config.init_embedding_dim:
            raise ConfigError(
                f"SimVQ: init_embedding_dim must be {features.shape[1]}, the features' width "
                f"(llm_hidden_size), got {config.init_embedding_dim}"
            )
        found = kmeans(features, config.codebook_size, seed=seed)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        self.centres.copy_(found[order.to(found.device)].view_as(self.centres))
        self.weight.copy_(model.encoder.weight.view_as(self.weight))
        self.bias.copy_(model.encoder.bias.view_as(self.bias))
        self.norm_weight.copy_(model.z_weight)
        self.norm_bias.copy_(model.z_bias)

    def codebooks(self) -> Tensor:
        """The code vectors [N, K, d], computed as `vision_weights.project_codebooks` does."""
        books = []
        for i, centres in enumerate(self.centres):
            projected = F.linear(centres, self.weight[i], self.bias[i])
            books.append(
                ops.layer_norm(projected, self.norm_weight[i], self.norm_bias[i], CODE_EPS)
            )
        return torch.stack(books)

    def forward(self, z: Tensor, model: VisionTokenizer) -> Quantized:
        """Quantizes z [T, N, d], the output of `VisionTokenizer.project`; codes as at inference.

        The loss is the mean over sub-codebooks, tokens and channels of
        ``(sg[z] - c)^2 + beta (z - sg[c])^2`` with z normalised and c its nearest code.
        """
        books = self.codebooks()
        normed = normalise(z, model)
        with torch.no_grad():
            norms = ops.codebook_norms(books)
            codes = ops.nearest_codes(z, books, norms, model.z_weight, model.z_bias, CODE_EPS)
        picked = books[torch.arange(len(books), device=z.device), codes]
        loss = F.mse_loss(picked, normed.detach()) + COMMITMENT * F.mse_loss(
            normed, picked.detach()
        )
        return Quantized(codes, normed + (picked - normed).detach(), loss, normed)

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the released layout; every quantizer stores the table of all centres."""
        table = self.centres.flatten(0, 1).cpu()
        tensors: dict[str, Tensor] = {}
        for i in range(self.config.n_q_tokens):
            start = f"quantizer.{i}."
            tensors[start + "embedding.weight"] = table.clone()
            for leaf, value in (
                ("embedding_proj.weight", self.weight),
                ("embedding_proj.bias", self.bias),
                ("q_norm.weight", self.norm_weight),
                ("q_norm.bias", self.norm_bias),
            ):
                tensors[start + leaf] = value[i].detach().cpu().clone()
        return tensors


def normalise(z: Tensor, model: VisionTokenizer) -> Tensor:
    """The features that are compared with codes: LayerNorm of z [T, N, d] per sub-codebook."""
    return ops.layer_norm(z, None, None, CODE_EPS) * model.z_weight + model.z_bias


def fuse(vectors: Tensor, model: VisionTokenizer) -> Tensor:
    """Code vectors [T, N, d] -> fused embeddings [T, O], as `VisionTokenizer.embed` of codes.

    Raises ValueError for a model without up-projectors.
    """
    if model.up_projectors is None:
        raise ValueError("fuse: the tokenizer has no up_projectors")
    fused = torch.einsum("tnd,nod->to", vectors, model.up_projectors)
    return fused if model.config.fusion_type == "sum" else fused / vectors.shape[1]


def code_usage(codes: Tensor, codes_per_book: int) -> tuple[Tensor, Tensor]:
    """Share of the codes in use [N], and perplexity [N], per sub-codebook of codes [T, N]."""
    counts = torch.stack([torch.bincount(c, minlength=codes_per_book) for c in codes.t()]).float()
    shares = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return (counts > 0).float().mean(1), entropy.exp()
