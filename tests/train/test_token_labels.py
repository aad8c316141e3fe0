"""The names of what lies at every token, against the drawn pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kelix_rt.train.token_labels import CLASSES, IGNORED, LETTERS, LabelHead, token_labels
from kelix_rt.train.world import draw, make_scenes
from kelix_rt.train.world_scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    Thing,
)

SIDE = 8


def test_a_thing_is_named_at_its_tokens_only() -> None:
    thing = Thing("star", "pink", "small", "top left")
    labels = token_labels(Scene((thing,), "navy"), SIDE).view(SIDE, SIDE, -1)
    there = labels[..., 0] > 0
    expected = [SHAPES.index("star") + 1, COLOURS.index("pink") + 1, SIZES.index("small") + 1, 0]
    # Diameter 0.2 around 0.26 of 8 tokens: from 1.28 to 2.88.
    assert there.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert labels[2, 1, :4].tolist() == expected
    assert (labels[..., -1] == BACKGROUNDS.index("navy")).all()


def test_what_is_odd_is_no_lesson() -> None:
    thing = Thing("star", "red orange", "small", "top left")
    labels = token_labels(Scene((thing,), "navy"), SIDE)
    there = labels[:, 0] > 0
    assert (labels[there, 1] == IGNORED).all() and (labels[~there, 1] == 0).all()
    head = LabelHead(4)  # it starts with all classes alike
    fused = torch.randn(len(labels), 4)
    head(fused, labels).backward()
    # All other tokens have colour 0, "none": as if the odd ones were not there.
    wanted = torch.full((len(COLOURS) + 1,), 1 / (len(COLOURS) + 1))
    wanted[0] -= 1
    assert head.linear.bias.grad is not None
    found = head.linear.bias.grad.split(CLASSES)[1]
    torch.testing.assert_close(found, wanted / len(CLASSES))
    assert "colour" not in head.right(fused, labels)


def test_a_word_is_named_in_its_band() -> None:
    labels = token_labels(Scene((), "white", word="owl", band="bottom"), SIDE).view(SIDE, SIDE, -1)
    rows, columns = (labels[..., 3] == WORDS.index("owl") + 1).nonzero(as_tuple=True)
    assert rows.unique().tolist() == [5, 6] and columns.unique().tolist() == [2, 3, 4, 5]
    assert not labels[..., :3].any()
    assert [LETTERS[i - 1] for i in labels[5, 2:6, 4].tolist()] == ["o", "w", "w", "l"]


@pytest.mark.parametrize("side", [6, 7, 8])
def test_what_is_drawn_is_named(side: int) -> None:
    """Nearly all that stands off the background lies in tokens with a name."""
    drawn = named = 0
    for scene in make_scenes("train", 30):
        pixels = np.asarray(draw(scene, side * 28)).astype(int)
        away = np.abs(pixels - np.median(pixels, axis=(0, 1))).sum(2) > 60
        tokens = away.reshape(side, 28, side, 28).sum((1, 3)).ravel()
        labelled = token_labels(scene, side)[:, :5].any(1).numpy()
        drawn, named = drawn + tokens.sum(), named + tokens[labelled].sum()
    assert named / drawn > 0.97


def test_the_head_learns_labels_and_says_how_many_are_right() -> None:
    labels = torch.stack([token_labels(scene, SIDE) for scene in make_scenes("train", 4)]).flatten(
        0, 1
    )
    fused = torch.randn(len(labels), 300, generator=torch.Generator().manual_seed(0))
    head = LabelHead(300)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    before = head.right(fused, labels)
    for _ in range(200):
        optimizer.zero_grad()
        head(fused, labels).backward()
        optimizer.step()
    after = head.right(fused, labels)
    assert head.linear.out_features == sum(CLASSES)
    assert set(after) >= {"shape", "colour", "size", "background"}
    assert before["shape"] == 0.0 and min(after.values()) == 1.0
