"""Which split a scene belongs to, and the scenes of a split.

Scenes are drawn from (split, index, seed) alone. The splits differ by construction, by held-out
combinations of attributes: a train scene contains none of them, a val scene at least one of val's
and none of test's, a test scene at least one of test's and none of val's. Every single attribute is
common in train; only the combinations are new.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Literal, get_args

from kelix_rt.train.world_scene import (
    BACKGROUNDS,
    BANDS,
    CELLS,
    COLOURS,
    ODD,
    OPPOSITES,
    SHAPES,
    SIZES,
    WORDS,
    WORLD_VERSION,
    Scene,
    Thing,
    relation_between,
    require,
)

Split = Literal["train", "val", "test"]
Kind = Literal["single", "pair", "same", "mixed", "word"]
SPLITS: tuple[Split, ...] = get_args(Split)

# How often a scene of each kind occurs, in percent.
KIND_WEIGHTS: dict[Kind, int] = {"single": 15, "pair": 27, "same": 16, "mixed": 15, "word": 27}

# (what is combined, its members): see the functions below that make one.
Combination = tuple[str, str | int, str | int, str | int]


def combinations(scene: Scene) -> set[Combination]:
    """The combinations of attributes that decide the split."""
    found: set[Combination] = {look_combination(*thing.look) for thing in scene.things}
    found |= {
        count_combination(len(group), shape)
        for (_, shape), group in scene.groups().items()
        if len(group) > 1
    }
    # By shape alone as well: a text may speak of the "three circles" of a mixed scene.
    by_shape = Counter(thing.shape for thing in scene.things)
    found |= {count_combination(n, shape) for shape, n in by_shape.items() if n > 1}
    # Of things that no text can tell apart as well: pictures show how they lie.
    for a, b in itertools.combinations(scene.things, 2):
        relation = relation_between(a.cell, b.cell)
        if relation is not None and a.look != b.look:
            found.add(relation_combination(a.shape, relation, b.shape))
    if scene.word is not None:
        found.add(word_combination(scene.word, scene.background))
    return found


def look_combination(colour: str, shape: str) -> Combination:
    """Colour and shape of one object."""
    return "look", colour, shape, ""


def count_combination(count: int, shape: str) -> Combination:
    """Two to four objects of one shape."""
    return "count", count, shape, ""


def relation_combination(shape: str, relation: str, other: str) -> Combination:
    """Two shapes and how they lie; "a right of b" is the same as "b left of a"."""
    if relation in ("right", "below"):
        return "relation", other, OPPOSITES[relation], shape
    return "relation", shape, relation, other


def word_combination(word: str, background: str) -> Combination:
    """A printed word and the colour it stands on."""
    return "word", word, background, ""


def split_of_combination(combination: Combination) -> Split:
    """The only split in which the combination occurs; "train" for free ones, which occur in all,
    and for those of something odd, which occur in train alone.

    Latin squares: each shape misses one colour per held-out split (1/8 of the looks), each word one
    background (1/6), each shape one right-hand or lower neighbour (1/7), three of 21 counts.
    """
    kind, first, second, third = combination
    if ODD.intersection(map(str, combination)):
        return "train"
    if kind == "look":
        rest = (COLOURS.index(str(first)) - SHAPES.index(str(second))) % 8
        held_out = {0: "test", 4: "val"}
    elif kind == "word":
        rest = (WORDS.index(str(first)) + BACKGROUNDS.index(str(second))) % 6
        held_out = {0: "test", 3: "val"}
    elif kind == "count":
        rest = (2 * int(first) + SHAPES.index(str(second))) % 7
        held_out = {0: "test", 3: "val"}
    else:
        axis = 0 if second == "left" else 1
        rest = (SHAPES.index(str(first)) + 2 * SHAPES.index(str(third)) + 3 * axis) % 7
        held_out = {0: "test", 3: "val"}
    return held_out.get(rest, "train")  # type: ignore[return-value]


def split_of(scene: Scene) -> Split | None:
    """The split a scene belongs to; None when it mixes combinations of val and test."""
    found = {split_of_combination(c) for c in combinations(scene)} - {"train"}
    if not found:
        return "train"
    return found.pop() if len(found) == 1 else None


def make_scene(split: Split, index: int, seed: int = 0, kind: Kind | None = None) -> Scene:
    """Scene number `index` of a split; the same arguments always give the same scene.

    kind: only scenes of this kind (default: all kinds by KIND_WEIGHTS). Raises InputError for an
    unknown split or kind.
    """
    require("make_scene", "split", split, SPLITS)
    rng = random.Random(f"kelix world {WORLD_VERSION} {seed} {split} {index} {kind}")
    if kind is None:
        kind = rng.choices(list(KIND_WEIGHTS), weights=list(KIND_WEIGHTS.values()))[0]
    require("make_scene", "kind", kind, tuple(KIND_WEIGHTS))
    while True:
        scene = _draw_scene(kind, rng)
        if split_of(scene) == split:
            return scene


def make_scenes(
    split: Split, count: int, seed: int = 0, start: int = 0, kind: Kind | None = None
) -> Iterator[Scene]:
    """Scenes start .. start + count - 1 of a split."""
    return (make_scene(split, index, seed, kind) for index in range(start, start + count))


def _draw_scene(kind: Kind, rng: random.Random) -> Scene:
    background = rng.choice(BACKGROUNDS)
    variation = rng.getrandbits(32)
    if kind == "word":
        return _draw_word_scene(background, variation, rng)
    corners = CELLS[:4]
    if kind == "single":
        things = _things([_look(rng)], [rng.choice(CELLS)])
    elif kind == "pair":
        things = _things(_different_looks(2, rng), _aligned_cells(corners, rng))
    elif kind == "same":
        count = rng.choice((2, 3, 4))
        things = _things([_look(rng)] * count, rng.sample(corners, count))
    else:
        count = rng.choice((3, 4))
        looks = _different_looks(count, rng)
        if rng.random() < 0.4:  # two of a kind among others: counts need more than the total
            looks[1] = looks[0]
        things = _things(looks, rng.sample(corners, count))
    return Scene(things, background, variation=variation)


def _draw_word_scene(background: str, variation: int, rng: random.Random) -> Scene:
    count = rng.choices((0, 1, 2), weights=(40, 40, 20))[0]
    band = rng.choice(BANDS) if count == 0 else rng.choice(("top", "bottom"))
    row = "bottom" if band == "top" else "top"
    cells = rng.sample([f"{row} left", f"{row} right"], count)
    things = _things(_different_looks(count, rng), cells)
    return Scene(things, background, rng.choice(WORDS), band, variation)


def _look(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES)


def _different_looks(count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    looks: dict[tuple[str, str], tuple[str, str, str]] = {}
    while len(looks) < count:
        look = _look(rng)
        looks.setdefault(look[:2], look)
    return list(looks.values())


def _aligned_cells(corners: tuple[str, ...], rng: random.Random) -> list[str]:
    while True:
        cells = rng.sample(corners, 2)
        if relation_between(*cells) is not None:
            return cells


def _things(looks: list[tuple[str, str, str]], cells: list[str]) -> tuple[Thing, ...]:
    return tuple(Thing(*look, cell) for look, cell in zip(looks, cells, strict=True))
