"""Pictures of scenes, drawn with Pillow at any size.

The geometry is relative to the side of the picture, so that a scene drawn at 112 and at 256 pixels
is the same picture at two resolutions.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from kelix_rt.errors import InputError
from kelix_rt.train.world_scene import BLENDS, UNNAMED, Scene, Thing

Colour = tuple[int, int, int]
Polygon = list[tuple[float, float]]

COLOUR_VALUES: dict[str, Colour] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 222, 50),
    "green": (45, 165, 70),
    "cyan": (45, 205, 215),
    "blue": (40, 80, 225),
    "purple": (130, 45, 175),
    "pink": (248, 130, 185),
}
BLENDED = 0.4  # share of its second colour in a blend
BACKGROUND_VALUES: dict[str, Colour] = {
    "white": (246, 246, 246),
    "gray": (140, 140, 140),
    "black": (22, 22, 22),
    "tan": (205, 185, 148),
    "navy": (24, 30, 74),
    "mint": (188, 226, 202),
}
# Words are printed in the ink that stands out.
DARK_INK, LIGHT_INK = (18, 18, 18), (250, 250, 250)
LIGHT_INK_ON = ("black", "navy")

# Centres (x, y) of the cells and of the words' bands, as fractions of the side.
CELL_CENTRES = {
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
    "center": (0.5, 0.5),
}
BAND_HEIGHTS = {"top": 0.26, "bottom": 0.74, "center": 0.5}
# Diameter of a shape, as a fraction of the side, and how far it may lie from its cell's centre.
DIAMETERS = {"small": 0.2, "large": 0.32}
SHIFTS = {"small": 0.05, "large": 0.025}
TURN = math.radians(6)  # shapes lean at most this far to either side
SUPERSAMPLING = 4
COVERED = 20  # levels by which a pixel of a thing differs from the background at least
MIN_SIDE = 32


def draw(scene: Scene, side: int = 112) -> Image.Image:
    """RGB picture of side x side pixels, anti-aliased.

    Raises InputError for side < 32, and for what is unnamed.
    """
    if side < MIN_SIDE:
        raise InputError(f"draw: side must be at least {MIN_SIDE} pixels, got {side}")
    if any(UNNAMED in thing.look for thing in scene.things):
        raise InputError("draw: every colour and shape must have a name, got an unnamed one")
    rng = random.Random(scene.variation) if scene.nuisances else _Plain()
    picture = _background(scene.background, side, rng)
    for thing in scene.things:
        _draw_thing(picture, thing, rng)
    if scene.word is not None:
        _draw_word(picture, scene, rng)
    return picture


def coverage(scene: Scene, drawn: Image.Image) -> Image.Image:
    """Mode L picture as large as `drawn`, `draw` of the scene; white where a thing or a word is."""
    bare = draw(replace(scene, things=(), word=None), drawn.width)
    red, green, blue = ImageChops.difference(drawn, bare).split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return most.point([0] * (COVERED + 1) + [255] * (255 - COVERED))


class _Plain(random.Random):
    """Nuisances of a plain picture: the middle of every range."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2

    def randint(self, a: int, b: int) -> int:
        return (a + b) // 2


@cache
def shape_outline(shape: str) -> tuple[Polygon, ...]:
    """Polygons of a shape of diameter 1 around (0, 0), y down; a second polygon is a hole."""
    outlines: dict[str, tuple[Polygon, ...]] = {
        "circle": (_regular(48, 0.5),),
        "ring": (_regular(48, 0.5), _regular(48, 0.26)),
        "square": ([(-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)],),
        "triangle": ([(0.0, -0.47), (0.52, 0.43), (-0.52, 0.43)],),
        "diamond": ([(0.0, -0.54), (0.46, 0.0), (0.0, 0.54), (-0.46, 0.0)],),
        "star": (_star(0.56, 0.25),),
        "cross": (_cross(0.5, 0.17),),
        "pentagon": (_regular(5, 0.54),),
        "dome": (
            [
                (0.5 * math.cos(a * math.pi / 24), 0.25 - 0.5 * math.sin(a * math.pi / 24))
                for a in range(25)
            ],
        ),
        "arrow": (
            [
                (0.0, -0.5),
                (0.45, 0.0),
                (0.18, 0.0),
                (0.18, 0.5),
                (-0.18, 0.5),
                (-0.18, 0.0),
                (-0.45, 0.0),
            ],
        ),
        "house": ([(0.0, -0.5), (0.42, -0.1), (0.42, 0.45), (-0.42, 0.45), (-0.42, -0.1)],),
        "stripe": ([(-0.5, -0.2), (0.5, -0.2), (0.5, 0.2), (-0.5, 0.2)],),
        "elbow": (
            [(-0.45, -0.45), (-0.1, -0.45), (-0.1, 0.1), (0.45, 0.1), (0.45, 0.45), (-0.45, 0.45)],
        ),
        "drop": (
            [
                (0.0, -0.55),
                *(
                    (0.4 * math.cos(a), 0.13 + 0.4 * math.sin(a))
                    for a in (math.pi * i / 12 for i in range(-2, 15))
                ),
            ],
        ),
    }
    return outlines[shape]


def shape_mask(
    shape: str, diameter: float, turn: float, offset: tuple[float, float]
) -> Image.Image:
    """Coverage (mode L) of a shape on the smallest even canvas that holds it.

    diameter: pixels. turn: radians. offset: sub-pixel shift (x, y) from the canvas' centre.
    """
    half = math.ceil(diameter * 0.62) + 2
    scale = SUPERSAMPLING
    canvas = Image.new("L", (2 * half * scale, 2 * half * scale), 0)
    pen = ImageDraw.Draw(canvas)
    cos, sin = math.cos(turn), math.sin(turn)
    for number, polygon in enumerate(shape_outline(shape)):
        points = [
            (
                (half + offset[0] + diameter * (x * cos - y * sin)) * scale,
                (half + offset[1] + diameter * (x * sin + y * cos)) * scale,
            )
            for x, y in polygon
        ]
        pen.polygon(points, fill=0 if number else 255)
    return canvas.reduce(scale)


@cache
def word_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in scalable font, size in pixels. Raises InputError without FreeType."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("word_font: Pillow has no FreeType; install a Pillow wheel from PyPI")
    return font


def colour_value(name: str) -> Colour:
    """RGB of a colour or a blend."""
    if name not in BLENDS:
        return COLOUR_VALUES[name]
    first, second = (COLOUR_VALUES[part] for part in name.split())
    red, green, blue = (
        round((1 - BLENDED) * a + BLENDED * b) for a, b in zip(first, second, strict=True)
    )
    return red, green, blue


def _draw_thing(picture: Image.Image, thing: Thing, rng: random.Random) -> None:
    side = picture.width
    centre = [side * _shifted(c, SHIFTS[thing.size], rng) for c in CELL_CENTRES[thing.cell]]
    diameter = side * DIAMETERS[thing.size] * rng.uniform(0.94, 1.06)
    turn = rng.uniform(-TURN, TURN)
    whole = [math.floor(c) for c in centre]
    mask = shape_mask(thing.shape, diameter, turn, (centre[0] - whole[0], centre[1] - whole[1]))
    half = mask.width // 2
    colour = _tinted(colour_value(thing.colour), 12, rng)
    picture.paste(colour, (whole[0] - half, whole[1] - half), mask)


def _draw_word(picture: Image.Image, scene: Scene, rng: random.Random) -> None:
    side, scale = picture.width, SUPERSAMPLING
    font = word_font(round(scale * side * rng.uniform(0.27, 0.33)))
    x = side * (0.5 + rng.uniform(-0.05, 0.05))
    y = side * _shifted(BAND_HEIGHTS[scene.band], 0.04, rng)
    ink = LIGHT_INK if scene.background in LIGHT_INK_ON else DARK_INK
    # Supersampled like the shapes: letters drawn in place would snap to whole pixels.
    height = side // 2
    top = math.floor(y) - height // 2
    canvas = Image.new("L", (side * scale, height * scale), 0)
    ImageDraw.Draw(canvas).text((x * scale, (y - top) * scale), scene.word or "", 255, font, "mm")
    picture.paste(_tinted(ink, 12, rng), (0, top), canvas.reduce(scale))


def _background(name: str, side: int, rng: random.Random) -> Image.Image:
    """A tint of the colour with a faint slope of brightness in some direction."""
    base = _tinted(BACKGROUND_VALUES[name], 7, rng)
    if isinstance(rng, _Plain):
        return Image.new("RGB", (side, side), base)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 6)
    ramp = np.linspace(-strength, strength, side, dtype=np.float32)
    slope = ramp[None, :] * math.cos(angle) + ramp[:, None] * math.sin(angle)
    planes = [(slope + level).clip(0, 255).astype(np.uint8) for level in base]
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def _shifted(place: float, most: float, rng: random.Random) -> float:
    """A place moved by at most `most`; of a plain picture on a quarter of the side, so that a thing
    covers the pixels of its tokens alike in every cell."""
    if isinstance(rng, _Plain):
        return round(4 * place) / 4
    return place + rng.uniform(-1, 1) * most


def _tinted(colour: Colour, spread: int, rng: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, c + rng.randint(-spread, spread))) for c in colour)
    return red, green, blue


def _regular(corners: int, radius: float) -> Polygon:
    angles = (2 * math.pi * i / corners for i in range(corners))
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star(outer: float, inner: float) -> Polygon:
    radii = (outer, inner)
    angles = (math.pi * i / 5 - math.pi / 2 for i in range(10))
    # The five tips reach lower than they reach up: centre the box, not the tips' circle.
    drop = outer * (1 - math.cos(math.pi / 5)) / 2
    return [
        (radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a) + drop)
        for i, a in enumerate(angles)
    ]


def _cross(reach: float, arm: float) -> Polygon:
    a, r = arm, reach
    return [
        *[(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a)],
        *[(a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)],
    ]
