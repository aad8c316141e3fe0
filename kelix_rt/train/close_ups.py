"""Close-ups of pictures: windows around a thing or a word, for the visual tokenizer's warm-up.

Most of a picture is background. Windows at the picture's own scale show several times as many
things, and ten times as many words, for the same work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import Tensor

from kelix_rt.train.world_draw import BAND_HEIGHTS, CELL_CENTRES
from kelix_rt.train.world_scene import Scene

THING_SIDES = {"small": 3, "large": 4}  # tokens
WORD_ROWS = 3


@dataclass(frozen=True)
class Window:
    """Rows and columns of tokens of a picture, first and past the last."""

    top: int
    bottom: int
    left: int
    right: int

    def tokens(self, values: Tensor, side: int) -> Tensor:
        """The window's rows of [side * side, ...], one row per token."""
        grid = values.view(side, side, *values.shape[1:])
        return grid[self.top : self.bottom, self.left : self.right].flatten(0, 1)

    def patches(self, values: Tensor, side: int) -> Tensor:
        """The window's rows of [4 * side * side, ...], one row per patch."""
        doubled = Window(*(2 * edge for edge in (self.top, self.bottom, self.left, self.right)))
        return doubled.tokens(values, 2 * side)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(1, rows, columns) in patches."""
        return 1, 2 * (self.bottom - self.top), 2 * (self.right - self.left)


def thing_windows(scene: Scene, side: int, rng: random.Random) -> list[Window]:
    """A square window around every thing, not quite in its middle. side: tokens per row."""
    found = []
    for thing in scene.things:
        size = min(THING_SIDES[thing.size], side)
        x, y = (_start(centre, size, side, rng) for centre in CELL_CENTRES[thing.cell])
        found.append(Window(y, y + size, x, x + size))
    return found


def word_windows(scene: Scene, side: int, rng: random.Random) -> list[Window]:
    """A strip with the printed word, if there is one. side: tokens per row."""
    if scene.word is None:
        return []
    rows = min(WORD_ROWS, side)
    top = _start(BAND_HEIGHTS[scene.band], rows, side, rng)
    return [Window(top, top + rows, 0, side)]


def _start(centre: float, length: int, side: int, rng: random.Random) -> int:
    """First of `length` tokens with `centre` (a fraction of the side) near their middle."""
    middle = centre * side - length / 2
    return min(max(0, round(middle + rng.uniform(-0.5, 0.5))), side - length)
