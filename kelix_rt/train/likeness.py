"""What a cut-out blob looks like: the known shapes and words, drawn and compared.

Both are stretched to one grid before they are compared, so that place and size do not matter. The
templates are blurred as well as sharp: a soft star loses its tips and a soft ring its hole, but
each in its own way.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from kelix_rt.train.world_draw import TURN, shape_mask, word_font
from kelix_rt.train.world_scene import SHAPES, WORDS

Pixels = NDArray[np.float32]

UNKNOWN = "unknown"
TEMPLATE_SIDE = 60  # pixels: diameter of the template shapes, size of the template font
SHAPE_GRID = 24
SHAPE_BLURS = (0.01, 0.04, 0.07, 0.1)  # Gaussian radii as fractions of the diameter
MIN_OVERLAP = 0.68  # intersection over union below which a blob has no known shape
WORD_GRID = (64, 20)
WORD_BLURS = (0.01, 0.05, 0.09)  # as fractions of the font size
MIN_WORD_MATCH = 0.6  # correlation, less a penalty for another aspect


def classify_shape(coverage: Pixels) -> tuple[str, float]:
    """The shape that overlaps best with a blob's coverage (float32 [h, w], 0 to 1, cut to its box).

    Returns (shape, longer side of that shape's box at diameter 1); ("unknown", 1.0) for stretched
    or unlike blobs.
    """
    height, width = coverage.shape
    if not 0.7 < height / width < 1.45:
        return UNKNOWN, 1.0
    names, templates, extents = _shape_templates()
    grid = _resized(coverage, (SHAPE_GRID, SHAPE_GRID)).ravel()
    overlap = np.minimum(templates, grid).sum(1) / np.maximum(templates, grid).sum(1)
    best = int(overlap.argmax())
    if overlap[best] < MIN_OVERLAP:
        return UNKNOWN, 1.0
    return names[best], extents[best]


def classify_word(coverage: Pixels) -> str | None:
    """The vocabulary's word that looks most like some ink's coverage (float32 [h, w], 0 to 1)."""
    grid, aspect = _word_grid(coverage)
    names, templates, aspects = _word_templates()
    match = templates @ grid - 0.5 * np.abs(np.log(aspects / aspect))
    best = int(match.argmax())
    return names[best] if match[best] >= MIN_WORD_MATCH else None


def box_of(mask: NDArray[np.bool_], margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns that hold a mask, widened by margin; at least one pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    return (
        slice(max(0, int(rows[0]) - margin), int(rows[-1]) + 1 + margin),
        slice(max(0, int(columns[0]) - margin), int(columns[-1]) + 1 + margin),
    )


@cache
def _shape_templates() -> tuple[list[str], Pixels, list[float]]:
    """Names, coverages [shapes * turns * blurs, grid * grid] and extents of the known shapes."""
    names, grids, extents = [], [], []
    for shape, turn, blur in product(SHAPES, (-TURN, 0.0, TURN), SHAPE_BLURS):
        mask = ImageOps.expand(shape_mask(shape, TEMPLATE_SIDE, turn, (0.0, 0.0)), border=16)
        soft = mask.filter(ImageFilter.GaussianBlur(TEMPLATE_SIDE * blur))
        coverage = np.asarray(soft, dtype=np.float32)
        own = coverage[coverage > 0.2 * coverage.max()]
        coverage = (coverage / np.median(own[own >= np.median(own)])).clip(0, 1)
        rows, columns = box_of(coverage > 0.5)
        names.append(shape)
        extents.append(max(rows.stop - rows.start, columns.stop - columns.start) / TEMPLATE_SIDE)
        grids.append(_resized(coverage[rows, columns], (SHAPE_GRID, SHAPE_GRID)).ravel())
    return names, np.stack(grids), extents


@cache
def _word_templates() -> tuple[list[str], Pixels, Pixels]:
    """Names, unit vectors and aspects of the vocabulary, sharp and blurred."""
    names, grids, aspects = [], [], []
    for word, blur in product(WORDS, WORD_BLURS):
        canvas = Image.new("L", (240, 120), 0)
        ImageDraw.Draw(canvas).text((120, 60), word, 255, word_font(TEMPLATE_SIDE), "mm")
        soft = canvas.filter(ImageFilter.GaussianBlur(TEMPLATE_SIDE * blur))
        coverage = np.asarray(soft, dtype=np.float32)
        grid, aspect = _word_grid((coverage / np.percentile(coverage, 97)).clip(0, 1))
        names.append(word)
        grids.append(grid)
        aspects.append(aspect)
    return names, np.stack(grids), np.array(aspects, dtype=np.float32)


def _word_grid(coverage: Pixels) -> tuple[Pixels, float]:
    """(unit vector of the inked box's zero-mean pixels, width / height of the box)."""
    rows, columns = box_of(coverage > 0.4)
    grid = _resized(coverage[rows, columns], WORD_GRID).ravel()
    grid = grid - grid.mean()
    aspect = (columns.stop - columns.start) / (rows.stop - rows.start)
    return grid / max(float(np.linalg.norm(grid)), 1e-6), aspect


def _resized(coverage: Pixels, size: tuple[int, int]) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(coverage, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
