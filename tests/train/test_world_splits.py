from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from kelix_rt.errors import InputError
from kelix_rt.train.pictures import odd_twin, strange_twin
from kelix_rt.train.world_scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    UNNAMED,
    WORDS,
    Scene,
    Thing,
    unnamed,
)
from kelix_rt.train.world_splits import (
    KIND_WEIGHTS,
    SPLITS,
    Split,
    combinations,
    count_combination,
    look_combination,
    make_scene,
    make_scenes,
    relation_combination,
    split_of,
    split_of_combination,
    word_combination,
)

LOOKS = [look_combination(c, s) for c, s in product(COLOURS, SHAPES)]
PRINTS = [word_combination(w, b) for w, b in product(WORDS, BACKGROUNDS)]
COUNTS = [count_combination(n, s) for n, s in product((2, 3, 4), SHAPES)]
RELATIONS = [
    relation_combination(a, r, b) for a, r, b in product(SHAPES, ("left", "above"), SHAPES)
]


@pytest.mark.parametrize(
    ("family", "held_out"), [(LOOKS, 7), (PRINTS, 48), (COUNTS, 3), (RELATIONS, 14)]
)
def test_held_out_combinations(family: list, held_out: int) -> None:
    sizes = Counter(split_of_combination(c) for c in family)
    assert sizes == {"test": held_out, "val": held_out, "train": len(family) - 2 * held_out}


def test_every_attribute_stays_in_train() -> None:
    for family in (LOOKS, PRINTS, COUNTS, RELATIONS):
        free = [c for c in family if split_of_combination(c) == "train"]
        for position in (1, 2, 3):
            assert {c[position] for c in free} == {c[position] for c in family}


def test_splits_are_disjoint_by_construction() -> None:
    seen: dict[Split, set] = {}
    for split in SPLITS:
        scenes = list(make_scenes(split, 1500))
        assert all(split_of(scene) == split for scene in scenes)
        seen[split] = set().union(*map(combinations, scenes))
        if split != "train":
            # Every single scene holds something that train never shows.
            assert all(
                any(split_of_combination(c) == split for c in combinations(s)) for s in scenes
            )
    assert not any(split_of_combination(c) != "train" for c in seen["train"])
    for split, other in (("val", "test"), ("test", "val")):
        assert not any(split_of_combination(c) == other for c in seen[split])
        held_out = {c for f in (LOOKS, COUNTS, RELATIONS) for c in f} & seen[split]
        assert Counter(split_of_combination(c) for c in held_out)[split] == 7 + 3 + 14


def test_what_is_odd_is_trained_on() -> None:
    for scene in make_scenes("train", 300):
        for twin in (strange_twin(scene), odd_twin(scene), unnamed(strange_twin(scene))):
            assert split_of(twin) == "train"
    for colour in (UNNAMED, "red orange"):
        assert split_of_combination(look_combination(colour, "star")) == "train"


def test_things_that_no_text_tells_apart_lie_as_their_split_allows() -> None:
    held_out = next(c for c in RELATIONS if split_of_combination(c) == "test" and c[2] == "left")
    left, right = str(held_out[1]), str(held_out[3])
    twice = [Thing(left, "red", "small", cell) for cell in ("top left", "bottom right")]
    scene = Scene((*twice, Thing(right, "blue", "small", "top right")), "white")
    assert not scene.relations() and held_out in combinations(scene)


def test_mirrored_relations_are_one() -> None:
    assert relation_combination("ring", "right", "star") == relation_combination(
        "star", "left", "ring"
    )
    assert relation_combination("ring", "below", "star") == relation_combination(
        "star", "above", "ring"
    )


def test_scene_of_val_and_test_belongs_nowhere() -> None:
    test, val = (
        next(c for c in LOOKS if split_of_combination(c) == split) for split in ("test", "val")
    )
    things = (
        Thing(str(test[2]), str(test[1]), "small", "top left"),
        Thing(str(val[2]), str(val[1]), "small", "bottom right"),
    )
    assert split_of(Scene(things, "white")) is None


def test_scenes_are_deterministic() -> None:
    for split in SPLITS:
        first = [make_scene(split, i) for i in range(50)]
        assert first == list(make_scenes(split, 50))
        assert first[20:] == list(make_scenes(split, 30, start=20))
        assert first != list(make_scenes(split, 50, seed=1))


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_kinds(kind: str) -> None:
    sizes = {"single": {1}, "pair": {2}, "same": {2, 3, 4}, "mixed": {3, 4}, "word": {0, 1, 2}}
    for split in SPLITS:
        scenes = list(make_scenes(split, 60, kind=kind))  # type: ignore[arg-type]
        assert {len(s.things) for s in scenes} == sizes[kind]
        assert all((s.word is not None) == (kind == "word") for s in scenes)
        assert kind != "pair" or all(len(s.relations()) == 1 for s in scenes)


def test_unknown_split_and_kind_are_refused() -> None:
    with pytest.raises(InputError, match="split must be one of train, val, test"):
        make_scene("dev", 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kind must be one of"):
        make_scene("train", 0, kind="crowd")  # type: ignore[arg-type]
