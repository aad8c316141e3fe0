"""What places weigh in the DiT's loss."""

from __future__ import annotations

from kelix_rt.train.place_weights import WEIGHTS, place_weights
from kelix_rt.train.world_scene import Scene, Thing


def test_what_is_small_weighs_most() -> None:
    small, large = (
        Thing("star", "red", "small", "top left"),
        Thing("ring", "blue", "large", "top right"),
    )
    weights = place_weights(Scene((small, large), "navy"), 8)
    assert (weights == WEIGHTS["small"]).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    rows, columns = (weights == WEIGHTS["large"]).nonzero(as_tuple=True)
    assert rows.unique().tolist() == [0, 1, 2, 3] and columns.unique().tolist() == [4, 5, 6, 7]
    assert (weights[4:] == 1).all()


def test_words_weigh_and_what_is_odd() -> None:
    house = Thing("house", "red", "small", "top left")
    weights = place_weights(Scene((house,), "white", word="owl", band="bottom"), 8)
    assert weights[1, 1] == WEIGHTS["small"]
    assert (weights[5:7, 2:6] == WEIGHTS["word"]).all()
