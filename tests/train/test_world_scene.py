from __future__ import annotations

import random
from collections import Counter

import pytest

from kelix_rt.errors import ConfigError, InputError
from kelix_rt.train.world import make_scene
from kelix_rt.train.world_scene import (
    BLENDS,
    CELLS,
    COLOURS,
    ODD_SHAPES,
    OPPOSITES,
    UNNAMED,
    WORDS,
    WORLD_VERSION,
    Scene,
    Thing,
    odd,
    relation_between,
    require_world,
    strange,
    unnamed,
)

RING = Thing("ring", "red", "small", "top left")
STAR = Thing("star", "blue", "large", "top right")


def test_relations_name_unique_aligned_pairs() -> None:
    cross = Thing("cross", "pink", "small", "bottom left")
    assert Scene((RING, STAR, cross), "white").relations() == [
        (RING, "left", STAR),
        (RING, "above", cross),
    ]
    twin = Thing("ring", "red", "large", "bottom left")
    assert Scene((RING, twin), "white").relations() == []


def test_relation_between_is_antisymmetric() -> None:
    for a in CELLS:
        for b in CELLS:
            there, back = relation_between(a, b), relation_between(b, a)
            assert (there is None) == (back is None)
            assert there is None or OPPOSITES[there] == back


def test_vocabulary_is_closed_and_large_enough() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 40
    assert all(word.islower() and len(word) <= 4 for word in WORDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((RING, RING), "white"), "cells of their own"),
        (((RING, Thing("ring", "red", "small", "center")), "white"), "must be alone"),
        (((RING,), "white", "cat", "top"), "crosses"),
        (((RING,), "blue"), "background must be one of"),
        (((), "white", "Cat"), "word must be one of"),
    ],
)
def test_impossible_scenes_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scene(*arguments)


def test_strange_scenes_are_odd_in_one_attribute() -> None:
    scene = make_scene("train", 0, kind="mixed")
    seen = set()
    for seed in range(8):
        other = strange(scene, random.Random(seed))
        pairs = list(zip(scene.things, other.things, strict=True))
        assert [(a.size, a.cell) for a, _ in pairs] == [(b.size, b.cell) for _, b in pairs]
        kept = [(a.colour == b.colour, a.shape == b.shape) for a, b in pairs]
        assert len(set(kept)) == 1 and sum(kept[0]) == 1
        assert all(b.look.count(UNNAMED) == 1 for b in unnamed(other).things)
        seen.add(kept[0])
    assert len(seen) == 2, "either attribute may go"


def test_odd_scenes_mix_all_kinds_of_things() -> None:
    scene = make_scene("train", 0, kind="mixed")
    seen = Counter()
    for seed in range(200):
        changed = odd(scene, random.Random(seed))
        assert len(changed.groups()) <= len(scene.groups())
        for thing, other in zip(scene.things, changed.things, strict=True):
            assert (thing.size, thing.cell) == (other.size, other.cell)
            seen[other.colour in BLENDS, other.shape in ODD_SHAPES] += 1
    shares = [seen[kind] / seen.total() for kind in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert shares == pytest.approx([0.1, 0.45, 0.3, 0.15], abs=0.05)


def test_unnamed_is_what_is_odd_alone() -> None:
    things = (RING, Thing("star", "red orange", "large", "top right"))
    things += (Thing("house", "red", "small", "bottom left"),)
    assert unnamed(Scene(things, "white")).things == (
        RING,
        Thing("star", UNNAMED, "large", "top right"),
        Thing(UNNAMED, "red", "small", "bottom left"),
    )


def test_blends_are_of_two_colours() -> None:
    assert len(set(BLENDS)) == len(BLENDS)
    for first, second in (name.split() for name in BLENDS):
        apart = (COLOURS.index(first) - COLOURS.index(second)) % len(COLOURS)
        assert apart in (1, 2, 6, 7)


def test_unknown_attribute_is_refused() -> None:
    with pytest.raises(InputError, match="shape must be one of circle"):
        Thing("blob", "red", "small", "center")


def test_another_world_is_refused() -> None:
    require_world(WORLD_VERSION)
    for version in (WORLD_VERSION + 1, None, str(WORLD_VERSION)):
        with pytest.raises(ConfigError, match="world_version"):
            require_world(version)
