"""Choosing questions."""

from __future__ import annotations

import random

from kelix_rt.train.asked import of_kind, some
from kelix_rt.train.world import make_scene


def test_some_are_different_and_no_more_than_wanted() -> None:
    for seed in range(30):
        scene = make_scene("train", seed)
        found = some(scene, random.Random(seed), 6)
        assert 0 < len(found) <= 6 and len(set(found)) == len(found)


def test_others_are_asked_where_a_kind_is_missing() -> None:
    single = make_scene("train", 0, kind="single")
    others = of_kind("relation", single, random.Random(0), 4)
    assert len(others) == 4 and "relation" not in {question.kind for question in others}
    pair = make_scene("train", 0, kind="pair")
    found = of_kind("relation", pair, random.Random(0), 4)
    assert {question.kind for question in found} == {"relation"}
