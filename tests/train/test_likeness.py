from __future__ import annotations

import numpy as np
import pytest

from kelix_rt.train.likeness import UNKNOWN, box_of, classify_shape, classify_word
from kelix_rt.train.world_draw import TURN, shape_mask
from kelix_rt.train.world_scene import SHAPES


def coverage_of(shape: str, diameter: float, turn: float) -> np.ndarray:
    mask = np.asarray(shape_mask(shape, diameter, turn, (0.3, -0.2)), dtype=np.float32) / 255
    return mask[box_of(mask > 0.5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diameter", [12.0, 20.0, 36.0, 90.0])
def test_shapes_at_every_size_and_turn(shape: str, diameter: float) -> None:
    for turn in np.linspace(-TURN, TURN, 5):
        assert classify_shape(coverage_of(shape, diameter, float(turn)))[0] == shape


def test_unlike_blobs_are_unknown() -> None:
    corner = np.ones((30, 30), dtype=np.float32)
    corner[8:, 8:] = 0
    stripes = np.zeros((30, 30), dtype=np.float32)
    stripes[::4] = 1
    for blob in (corner, stripes, np.ones((10, 30), dtype=np.float32)):
        assert classify_shape(blob)[0] == UNKNOWN


def test_scribble_is_no_word() -> None:
    noise = np.random.default_rng(0).random((20, 60)).astype(np.float32)
    assert classify_word(noise) is None
    assert classify_word(np.ones((20, 60), dtype=np.float32)) is None


def test_box_of_an_empty_mask_is_one_pixel() -> None:
    assert box_of(np.zeros((5, 5), dtype=bool)) == (slice(0, 1), slice(0, 1))
