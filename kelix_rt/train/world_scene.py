"""Scenes of the synthetic world: what is in a picture.

A scene is data only: it knows neither pixels nor words.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kelix_rt.errors import ConfigError, InputError

# Checkpoints record it: any change to scenes, pictures, texts or splits makes it grow.
WORLD_VERSION = 2

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
# Things that are odd are in no split but train. Questions have no name for what is odd in them,
# requests do: a "red orange" is red with some orange, and lies well apart from every plain colour.
ODD_SHAPES = ("pentagon", "dome", "arrow", "house", "stripe", "elbow", "drop")
# fmt: off
BLENDS = (
    "red orange", "orange red", "orange green", "green orange", "yellow green", "green yellow",
    "yellow cyan", "cyan yellow", "green cyan", "cyan green", "green blue", "blue green",
    "cyan blue", "blue cyan", "cyan purple", "purple cyan", "blue purple", "purple blue",
    "blue pink", "pink blue", "purple pink", "pink purple", "purple red", "red purple",
    "pink red", "red pink", "pink orange", "orange pink",
)
# fmt: on
UNNAMED = "unnamed"  # the colour or shape of an odd thing, for who has no name for it
ODD = frozenset((*ODD_SHAPES, *BLENDS, UNNAMED))
Look = tuple[str, str]  # (colour, shape): what tells two things apart in words
SIZES = ("small", "large")
BACKGROUNDS = ("white", "gray", "black", "tan", "navy", "mint")
CELLS = ("top left", "top right", "bottom left", "bottom right", "center")
BANDS = ("top", "bottom", "center")
RELATIONS = ("left", "right", "above", "below")
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
# fmt: off
WORDS = (
    "ant", "bag", "bed", "bee", "bird", "boat", "book", "cake", "car", "cat", "corn", "cup",
    "desk", "dog", "door", "duck", "fish", "flag", "fox", "frog", "gate", "hat", "home", "ice",
    "jam", "key", "kite", "lamp", "leaf", "lion", "map", "milk", "moon", "nest", "owl", "park",
    "pen", "pie", "rain", "road", "shop", "snow", "sock", "soup", "sun", "taxi", "tree", "zoo",
)
# fmt: on


@dataclass(frozen=True)
class Thing:
    """One object of a scene: shape, colour, size and the cell it lies in.

    Shape and colour may be odd, or `UNNAMED`, which cannot be drawn.
    """

    shape: str
    colour: str
    size: str
    cell: str

    def __post_init__(self) -> None:
        require("Thing", "shape", self.shape, (*SHAPES, *ODD_SHAPES, UNNAMED))
        require("Thing", "colour", self.colour, (*COLOURS, *BLENDS, UNNAMED))
        require("Thing", "size", self.size, SIZES)
        require("Thing", "cell", self.cell, CELLS)

    @property
    def look(self) -> Look:
        """Its colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    things: 0 to 4 objects, in cells of their own. word: printed word or None. band: where the word
    stands (nothing else lies there). variation: seed of the nuisances, which no text names (shifts,
    exact sizes, turns, tints). nuisances: whether there are any. Raises InputError for unknown
    names or clashing places.
    """

    things: tuple[Thing, ...]
    background: str
    word: str | None = None
    band: str = "center"
    variation: int = 0
    nuisances: bool = True

    def __post_init__(self) -> None:
        require("Scene", "background", self.background, BACKGROUNDS)
        require("Scene", "band", self.band, BANDS)
        if self.word is not None:
            require("Scene", "word", self.word, WORDS)
        cells = [thing.cell for thing in self.things]
        if len(cells) > 4 or len(set(cells)) < len(cells):
            raise InputError(
                f"Scene: things must lie in cells of their own, at most 4, got {cells}"
            )
        if "center" in cells and len(cells) > 1:
            raise InputError(f"Scene: a thing in the center must be alone, got {cells}")
        if self.word is not None and any(_crosses(self.band, cell) for cell in cells):
            raise InputError(f"Scene: the word's band {self.band!r} crosses the things in {cells}")

    def groups(self) -> dict[Look, list[Thing]]:
        """Objects by (colour, shape), in order of first appearance."""
        found: dict[Look, list[Thing]] = {}
        for thing in self.things:
            found.setdefault(thing.look, []).append(thing)
        return found

    def relations(self) -> list[tuple[Thing, str, Thing]]:
        """(a, relation, b): "a is left of b" and so on, each aligned pair once in its order.

        Only between objects that their looks name uniquely, in one row or one column.
        """
        unique = [group[0] for group in self.groups().values() if len(group) == 1]
        found = []
        for number, a in enumerate(unique):
            for b in unique[number + 1 :]:
                relation = relation_between(a.cell, b.cell)
                if relation is not None:
                    found.append((a, relation, b))
        return found


def plain(scene: Scene) -> Scene:
    """The scene without nuisances. Drawing is taught with these: what no text names is most of a
    picture's codes, and drowns the little that the request decides."""
    return replace(scene, nuisances=False)


def strange(scene: Scene, rng: random.Random) -> Scene:
    """The scene with odd colours for all its things, or else odd shapes; like ones stay alike.

    Whoever knows triangles in odd colours, and yellow in odd shapes, has seen that the two are not
    tied to each other, and still no yellow triangle.
    """
    odd_colours = rng.random() < 0.5
    return _looking(scene, {look: _odd(look, rng, odd_colours, not odd_colours)
                            for look in scene.groups()})  # fmt: skip


def odd(scene: Scene, rng: random.Random) -> Scene:
    """The scene in which each look stays (10 %) or has an odd colour (45), an odd shape (30) or
    both (15)."""
    looks = {}
    for look in scene.groups():
        share = rng.random()
        looks[look] = _odd(look, rng, share < 0.6, 0.45 <= share < 0.9)
    return _looking(scene, looks)


def unnamed(scene: Scene) -> Scene:
    """The scene for who has no names for what is odd in it."""

    def known(name: str) -> str:
        return UNNAMED if name in ODD else name

    return _looking(scene, {(c, s): (known(c), known(s)) for c, s in scene.groups()})


def relation_between(cell: str, other: str) -> str | None:
    """How `cell` lies to `other` in the same row or column; None for diagonals and the center."""
    if "center" in (cell, other) or cell == other:
        return None
    (row, column), (other_row, other_column) = cell.split(), other.split()
    if row == other_row:
        return "left" if column == "left" else "right"
    if column == other_column:
        return "above" if row == "top" else "below"
    return None


def require_world(version: object) -> None:
    """Raises ConfigError when a checkpoint was trained on another version of the world."""
    if version != WORLD_VERSION:
        raise ConfigError(
            f"world_version: the checkpoint was trained on world {version!r}, this package draws "
            f"world {WORLD_VERSION}; train it anew or use the package version it came from"
        )


def _odd(look: Look, rng: random.Random, colour: bool, shape: bool) -> Look:
    return rng.choice(BLENDS) if colour else look[0], rng.choice(ODD_SHAPES) if shape else look[1]


def _looking(scene: Scene, looks: Mapping[Look, Look]) -> Scene:
    """The scene with other looks for its things."""
    things = []
    for thing in scene.things:
        colour, shape = looks[thing.look]
        things.append(replace(thing, colour=colour, shape=shape))
    return replace(scene, things=tuple(things))


def _crosses(band: str, cell: str) -> bool:
    return band == "center" or cell == "center" or cell.startswith(band)


def require(where: str, field: str, value: str, known: Sequence[str]) -> None:
    """Raises InputError when a name is not a known one."""
    if value not in known:
        raise InputError(f"{where}: {field} must be one of {', '.join(known)}, got {value!r}")
