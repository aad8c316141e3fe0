"""Reads a picture of the synthetic world without any model, and judges it against a scene.

Background: median of the frame. Objects: connected components that stand off the background, with
an outline half way between the two colours (so blur does not move it). Colour: distance to the
palette. Shape: overlap with the outlines of the known shapes, stretched to one box. Components
without chroma are ink: letters of the printed word, read against the drawn vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from kelix_rt.errors import InputError
from kelix_rt.train.components import boxes, label
from kelix_rt.train.likeness import UNKNOWN, Pixels, box_of, classify_shape, classify_word
from kelix_rt.train.world_draw import (
    BACKGROUND_VALUES,
    CELL_CENTRES,
    COLOUR_VALUES,
    DIAMETERS,
    MIN_SIDE,
)
from kelix_rt.train.world_scene import Scene

STAND_OFF = 40.0  # RGB distance from the background that counts as something drawn
INK_CHROMA = 75.0  # max - min of RGB: ink and its blends stay below, object colours above
COLOUR_LIMIT = 110.0  # RGB distance to the palette beyond which a colour has no name
MIN_THING_AREA = 0.004  # fraction of the picture; smaller specks are not objects
MIN_INK_AREA = 0.004


@dataclass(frozen=True)
class Seen:
    """One object found: names (or "unknown"), centre and diameter as fractions of the side."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    diameter: float

    @property
    def look(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape

    @property
    def cell(self) -> str:
        """The cell whose centre is nearest."""
        return min(CELL_CENTRES, key=lambda c: _distance(CELL_CENTRES[c], self.centre))


@dataclass(frozen=True)
class Reading:
    """What a picture shows: objects from top to bottom, background, printed word or None."""

    things: tuple[Seen, ...]
    background: str
    word: str | None


def read_picture(picture: Image.Image | NDArray[np.uint8]) -> Reading:
    """Read a square RGB picture (PIL, or uint8 [S, S, 3], S >= 32).

    Raises InputError for another shape or dtype.
    """
    pixels = _smooth_pixels(picture)
    side = len(pixels)
    background = _frame_colour(pixels)
    labels, count = label(_norm(pixels - background) > STAND_OFF)
    margin = max(2, side // 40)
    things, ink = [], np.zeros(count + 1, dtype=bool)
    for number, (box, area) in enumerate(zip(*boxes(labels), strict=True), start=1):
        if area < 4:
            continue
        top, left = max(0, int(box[0]) - margin), max(0, int(box[1]) - margin)
        window = slice(top, int(box[2]) + margin), slice(left, int(box[3]) + margin)
        patch, inside = pixels[window], labels[window] == number
        core = _core_colour(patch, inside, background)
        if core.max() - core.min() < INK_CHROMA:
            ink[number] = True
        elif area >= MIN_THING_AREA * side * side:
            # Other components in the window are blanked: they are not part of this object.
            others = (labels[window] > 0) & ~inside
            patch = np.where(others[:, :, None], background, patch)
            things.append(_describe(_coverage(patch, background, core), core, (left, top), side))
    return Reading(
        tuple(sorted(things, key=lambda t: (t.centre[1], t.centre[0]))),
        _nearest(background, BACKGROUND_VALUES),
        _read_word(pixels, ink[labels], background),
    )


def judge(scene: Scene, picture: Image.Image | NDArray[np.uint8]) -> dict[str, bool]:
    """Which attributes of the scene the picture shows.

    shape, colour, size, location: the sets of shapes, colours, sizes and cells agree. object: every
    object has its colour and its shape, none is missing or extra. count: the number of objects.
    relation: objects of these looks exist and lie so. background. word: the printed word; no word:
    that there is none. Attributes the scene lacks (relation without an aligned pair, shape of an
    empty scene) are absent. Judge a generated picture by the attributes its prompt states.
    """
    seen = read_picture(picture)
    verdict = {
        "count": len(seen.things) == len(scene.things),
        "background": seen.background == scene.background,
        "no word" if scene.word is None else "word": seen.word == scene.word,
    }
    if scene.things:
        looks = Counter(t.look for t in scene.things)
        verdict["object"] = Counter(t.look for t in seen.things) == looks
        verdict["shape"] = {t.shape for t in seen.things} == {t.shape for t in scene.things}
        verdict["colour"] = {t.colour for t in seen.things} == {t.colour for t in scene.things}
        verdict["size"] = {t.size for t in seen.things} == {t.size for t in scene.things}
        verdict["location"] = Counter(t.cell for t in seen.things) == Counter(
            t.cell for t in scene.things
        )
    relations = scene.relations()
    if relations:
        verdict["relation"] = all(_holds(seen, a.look, r, b.look) for a, r, b in relations)
    return verdict


def _holds(seen: Reading, look: tuple[str, str], relation: str, other: tuple[str, str]) -> bool:
    first = [t.centre for t in seen.things if t.look == look]
    second = [t.centre for t in seen.things if t.look == other]
    if len(first) != 1 or len(second) != 1:
        return False
    dx, dy = second[0][0] - first[0][0], second[0][1] - first[0][1]
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    return (along > 0) == (relation in ("left", "above")) and abs(along) > abs(across)


def _smooth_pixels(picture: Image.Image | NDArray[np.uint8]) -> Pixels:
    """float32 [S, S, 3] after a light blur against noise."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(
                f"read_picture: an array must be uint8 [S, S, 3], got {picture.dtype} "
                f"{list(picture.shape)}"
            )
        picture = Image.fromarray(picture)
    if picture.width != picture.height or picture.width < MIN_SIDE:
        raise InputError(
            f"read_picture: the picture must be square with a side of at least {MIN_SIDE}, got "
            f"{picture.width} x {picture.height}"
        )
    radius = max(0.7, picture.width / 200)
    blurred = picture.convert("RGB").filter(ImageFilter.BoxBlur(radius))
    return np.asarray(blurred, dtype=np.float32)


def _frame_colour(pixels: Pixels) -> Pixels:
    """Median of the outermost 2 %; objects keep off the frame."""
    w = max(2, len(pixels) // 50)
    strips = (pixels[:w], pixels[-w:], pixels[:, :w], pixels[:, -w:])
    median: Pixels = np.median(np.concatenate([s.reshape(-1, 3) for s in strips]), axis=0)
    return median.astype(np.float32)


def _core_colour(patch: Pixels, inside: NDArray[np.bool_], background: Pixels) -> Pixels:
    """Median over the half of a component that stands off most: away from blurred edges."""
    own = patch[inside]
    distance = _norm(own - background)
    median: Pixels = np.median(own[distance >= np.median(distance)], axis=0)
    return median.astype(np.float32)


def _coverage(patch: Pixels, background: Pixels, core: Pixels) -> Pixels:
    """How much of each pixel the object covers, 0 to 1."""
    direction = core - background
    share: Pixels = (patch - background) @ (direction / np.dot(direction, direction))
    return share.clip(0, 1)


def _describe(coverage: Pixels, core: Pixels, corner: tuple[int, int], side: int) -> Seen:
    rows, columns = box_of(coverage > 0.5)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    shape, extent = classify_shape(coverage[rows, columns])
    diameter = max(height, width) / extent / side
    size = min(DIAMETERS, key=lambda name: abs(np.log(DIAMETERS[name] / diameter)))
    centre = (
        (corner[0] + (columns.start + columns.stop) / 2) / side,
        (corner[1] + (rows.start + rows.stop) / 2) / side,
    )
    return Seen(shape, _nearest(core, COLOUR_VALUES, COLOUR_LIMIT), size, centre, diameter)


def _read_word(pixels: Pixels, ink: NDArray[np.bool_], background: Pixels) -> str | None:
    """The vocabulary's word that looks most like the ink; None without ink or likeness."""
    if ink.sum() < MIN_INK_AREA * ink.size:
        return None
    rows, columns = box_of(ink, margin=1)
    inside = ink[rows, columns]
    core = _core_colour(pixels[rows, columns], inside, background)
    patch = np.where(inside[:, :, None], pixels[rows, columns], background)
    return classify_word(_coverage(patch, background, core))


def _nearest(
    colour: Pixels, palette: dict[str, tuple[int, int, int]], limit: float = float("inf")
) -> str:
    distances = {name: _distance(value, colour) for name, value in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= limit else UNKNOWN


def _distance(a: tuple[float, ...], b: tuple[float, ...] | Pixels) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def _norm(difference: Pixels) -> Pixels:
    norm: Pixels = np.sqrt(np.einsum("...c,...c->...", difference, difference))
    return norm
