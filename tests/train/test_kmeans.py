"""K-means: deterministic, finds clusters, uses every centre."""

from __future__ import annotations

import pytest
import torch

from kelix_rt.testing import randn
from kelix_rt.train.kmeans import assign, kmeans


def clusters(each: int = 30) -> torch.Tensor:
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    return corners.repeat_interleave(each, 0) + randn(4 * each, 2, scale=0.3)


def test_finds_well_separated_clusters() -> None:
    centres = kmeans(clusters(), 4)
    rounded = sorted(tuple(c) for c in (centres / 10).round().int().tolist())
    assert rounded == [(0, 0), (0, 1), (1, 0), (1, 1)]
    nearest, distance = assign(clusters(), centres)
    assert torch.bincount(nearest).tolist() == [30] * 4
    assert distance.max() < 4


def test_is_a_function_of_its_seed() -> None:
    features = randn(500, 8)
    assert torch.equal(kmeans(features, 40, seed=3), kmeans(features, 40, seed=3))
    assert not torch.equal(kmeans(features, 40, seed=3), kmeans(features, 40, seed=4))


def test_lloyd_lowers_the_error_and_every_centre_is_used() -> None:
    features = randn(600, 6)
    errors = [assign(features, kmeans(features, 50, n))[1].mean() for n in (0, 1, 8)]
    assert errors[0] > errors[1] > errors[2]
    assert len(assign(features, kmeans(features, 50))[0].unique()) == 50


def test_repeated_features_leave_no_centre_undefined() -> None:
    centres = kmeans(torch.ones(20, 3), 5)
    assert torch.equal(centres, torch.ones(5, 3))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3, 2), "4 centres need as many features, got 3"),
        (torch.full((9, 2), float("nan")), "NaN"),
    ],
)
def test_refuses_what_has_no_answer(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(features, 4)
