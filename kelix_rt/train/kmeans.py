"""K-means over patch features: where the codebooks of the visual tokenizer start."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 4096  # of a distance matrix at a time


def kmeans(features: Tensor, count: int, iterations: int = 12, seed: int = 0) -> Tensor:
    """`count` centres [count, D] of features [M, D], by Lloyd's iterations; a function of the seed.

    Started as k-means++ (each start drawn by its squared distance to those before); a centre that
    loses all its features moves to the worst represented one. Raises ValueError for M < count or
    features that are not finite.
    """
    if len(features) < count:
        raise ValueError(f"kmeans: {count} centres need as many features, got {len(features)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("kmeans: features hold NaN or infinity")
    features = features.float()
    generator = torch.Generator().manual_seed(seed)
    centres = _starts(features, count, generator)
    for _ in range(iterations):
        nearest, distance = assign(features, centres)
        sizes = torch.zeros(count, device=features.device)
        sizes.index_add_(0, nearest, torch.ones_like(distance))
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = sums / sizes.clamp(min=1).unsqueeze(1)
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = features[distance.topk(len(empty)).indices]
    return centres


def assign(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Index int64 [M] of the nearest centre of every feature, and the squared distance [M]."""
    norms = centres.square().sum(1)
    found = []
    for part in features.split(_ROWS):
        scores = norms - 2 * part @ centres.t()
        least, index = scores.min(1)
        found.append((index, (least + part.square().sum(1)).clamp(min=0)))
    return torch.cat([index for index, _ in found]), torch.cat([far for _, far in found])


def _starts(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ on the CPU's generator, so that every device draws the same."""
    first = int(torch.randint(len(features), (1,), generator=generator))
    chosen = [first]
    distance = (features - features[first]).square().sum(1)
    for _ in range(count - 1):
        total = distance.cumsum(0, dtype=torch.float64)
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total[-1]
        index = min(int(torch.searchsorted(total, draw, right=True)), len(features) - 1)
        chosen.append(index)
        distance = torch.minimum(distance, (features - features[index]).square().sum(1))
    return features[torch.tensor(chosen, device=features.device)].clone()
