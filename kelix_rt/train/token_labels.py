"""What lies at every token of a picture, for the auxiliary head of the tokenizer's training.

A pretrained vision transformer arrives with such knowledge; one trained from nothing in minutes has
to be told. The head is linear and reads the fused embedding, so what it learns the codes carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt.train.world_draw import BAND_HEIGHTS, CELL_CENTRES, DIAMETERS, word_font
from kelix_rt.train.world_scene import (
    BACKGROUNDS,
    COLOURS,
    ODD,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    Thing,
)

LETTERS = tuple(sorted(set("".join(WORDS))))
KINDS = ("shape", "colour", "size", "word", "letter", "background")
# A token's labels: class 0 of all but the last means that nothing of the kind lies there, IGNORED
# (cross_entropy's own default) that what lies there has no name.
IGNORED = -100
CLASSES = (
    *(len(names) + 1 for names in (SHAPES, COLOURS, SIZES, WORDS, LETTERS)),
    len(BACKGROUNDS),
)
_SHAPE, _COLOUR, _SIZE, _WORD, _LETTER, _BACKGROUND = range(len(CLASSES))
# What is learned late weighs more, or its gradient drowns in the noise of the rest.
WEIGHTS = (5.0, 1.0, 1.0, 2.0, 5.0, 1.0)
# Nominal font size of a printed word and half the height of its box, as fractions of the side.
_FONT_SIZE, _WORD_HALF_HEIGHT = 0.3, 0.1


def token_labels(scene: Scene, side: int) -> Tensor:
    """int64 [side * side, 6], row by row: the `KINDS` of each token.

    side: tokens per row and column. A token belongs to the thing or word whose nominal box it
    touches, and to the letter above or below its middle; shifts and turns of the drawing are left
    aside. A word is learned letter by letter long before it is learned as a whole.
    """
    labels = torch.zeros(side, side, len(CLASSES), dtype=torch.int64)
    labels[..., _BACKGROUND] = BACKGROUNDS.index(scene.background)
    for thing in scene.things:
        half = DIAMETERS[thing.size] / 2
        rows, columns = _touched(*CELL_CENTRES[thing.cell], half, half, side)
        labels[rows, columns, :_WORD] = torch.tensor(_thing_classes(thing))
    if scene.word is not None:
        ends = _letter_ends(scene.word)
        box = (0.5, BAND_HEIGHTS[scene.band], ends[-1], _WORD_HALF_HEIGHT)
        rows, columns = _touched(*box, side)
        labels[rows, columns, _WORD] = WORDS.index(scene.word) + 1
        for column in range(columns.start, columns.stop):
            middle = (column + 0.5) / side - 0.5
            number = min(sum(middle > end for end in ends), len(ends) - 1)
            labels[rows, column, _LETTER] = LETTERS.index(scene.word[number]) + 1
    return labels.flatten(0, 1)


class LabelHead(nn.Module):
    """Linear classifiers of `token_labels` over fused embeddings [T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(CLASSES))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, fused: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over tokens and over kinds by `WEIGHTS`; labels int64 [T, 6]."""
        parts = self.linear(fused).float().split(CLASSES, dim=1)
        losses = [F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]
        weighted = [weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True)]
        return torch.stack(weighted).sum() / len(CLASSES)

    @torch.no_grad()
    def right(self, fused: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of tokens labelled right by kind, of those where something of the kind lies."""
        found = {}
        parts = self.linear(fused).split(CLASSES, dim=1)
        for i, name in enumerate(KINDS):
            there = labels[:, i] > 0 if i != _BACKGROUND else torch.ones_like(labels[:, i]) > 0
            hits = (parts[i].argmax(1) == labels[:, i])[there]
            if len(hits):
                found[name] = float(hits.float().mean())
        return found


def _thing_classes(thing: Thing) -> Sequence[int]:
    names = ((SHAPES, thing.shape), (COLOURS, thing.colour), (SIZES, thing.size))
    return [IGNORED if name in ODD else known.index(name) + 1 for known, name in names]


@cache
def _letter_ends(word: str) -> tuple[float, ...]:
    """Where each letter ends right of the word's middle, as fractions of the side."""
    font = word_font(100)
    lengths = [font.getlength(word[: i + 1]) / 100 * _FONT_SIZE for i in range(len(word))]
    return tuple(length - lengths[-1] / 2 for length in lengths)


def _touched(
    x: float, y: float, half_width: float, half_height: float, side: int
) -> tuple[slice, slice]:
    """Rows and columns of the tokens that overlap a box around (x, y), in fractions of the side."""
    spans = []
    for centre, half in ((y, half_height), (x, half_width)):
        first = max(0, int((centre - half) * side))
        spans.append(slice(first, min(side, int((centre + half) * side) + 1)))
    return spans[0], spans[1]
