"""Scenes of the synthetic world: what is in a picture.

A scene is data only: it knows neither pixels nor words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kelix_rt.errors import ConfigError, InputError

# Checkpoints record it: any change to scenes, pictures, texts or splits makes it grow.
WORLD_VERSION = 1

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
# A colour or a shape that no text names; the scene's variation decides which one is drawn.
UNNAMED = "unnamed"
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

    Shape or colour may be `UNNAMED`.
    """

    shape: str
    colour: str
    size: str
    cell: str

    def __post_init__(self) -> None:
        require("Thing", "shape", self.shape, (*SHAPES, UNNAMED))
        require("Thing", "colour", self.colour, (*COLOURS, UNNAMED))
        require("Thing", "size", self.size, SIZES)
        require("Thing", "cell", self.cell, CELLS)

    @property
    def look(self) -> tuple[str, str]:
        """(colour, shape): what tells two objects apart in words."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    things: 0 to 4 objects, in cells of their own. word: printed word or None. band: where the word
    stands (nothing else lies there). variation: seed of what no text names: the looks of unnamed
    things, and the nuisances (shifts, exact sizes, turns, tints). nuisances: whether there are any;
    without them what texts can name decides the picture. Raises InputError for unknown names or
    clashing places.
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

    def groups(self) -> dict[tuple[str, str], list[Thing]]:
        """Objects by (colour, shape), in order of first appearance."""
        found: dict[tuple[str, str], list[Thing]] = {}
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
    """The scene with the colours of all its things, or else their shapes, replaced by unnamed ones.

    Whoever knows triangles in colours without a name, and yellow in shapes without one, has seen
    that the two are not tied to each other, and still no yellow triangle.
    """
    attribute = rng.choice(("colour", "shape"))
    things = (replace(thing, **{attribute: UNNAMED}) for thing in scene.things)
    return replace(scene, things=tuple(things))


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


def _crosses(band: str, cell: str) -> bool:
    return band == "center" or cell == "center" or cell.startswith(band)


def require(where: str, field: str, value: str, known: Sequence[str]) -> None:
    """Raises InputError when a name is not a known one."""
    if value not in known:
        raise InputError(f"{where}: {field} must be one of {', '.join(known)}, got {value!r}")
