"""Windows hold what they are around, at the picture's own scale."""

from __future__ import annotations

import random

import pytest
import torch

from kelix_rt.train.close_ups import Window, thing_windows, word_windows
from kelix_rt.train.token_labels import token_labels
from kelix_rt.train.world import make_scenes


def test_a_window_cuts_tokens_and_their_patches() -> None:
    window = Window(top=1, bottom=3, left=2, right=3)
    tokens = torch.arange(16)
    patches = torch.arange(64).view(8, 8)
    assert window.tokens(tokens, 4).tolist() == [6, 10]
    assert window.patches(patches.flatten(), 4).tolist() == patches[2:6, 4:6].flatten().tolist()
    assert window.grid == (1, 4, 2)


@pytest.mark.parametrize("side", [6, 7, 8])
def test_windows_hold_their_thing_or_word(side: int) -> None:
    rng = random.Random(0)
    seen = {"thing": 0, "word": 0}
    for scene in make_scenes("train", 60):
        labels = token_labels(scene, side)
        things = thing_windows(scene, side, rng)
        assert len(things) == len(scene.things)
        for thing, window in zip(scene.things, things, strict=True):
            inside = window.tokens(labels, side)
            assert len(inside) == (window.bottom - window.top) * (window.right - window.left)
            assert (inside[:, 0] > 0).sum() >= 4, thing
            seen["thing"] += 1
        for window in word_windows(scene, side, rng):
            kept, whole = window.tokens(labels, side)[:, 3] > 0, labels[:, 3] > 0
            assert kept.sum() >= whole.sum() / 2
            seen["word"] += 1
        assert (scene.word is None) == (word_windows(scene, side, rng) == [])
    assert min(seen.values()) > 5
