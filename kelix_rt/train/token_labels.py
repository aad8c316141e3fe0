"""What lies at every token of a picture, for the auxiliary head of the tokenizer's training.

A pretrained vision transformer arrives with such knowledge; one trained from nothing in minutes has
to be told. The head is linear and reads the fused embedding, so what it learns the codes carry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt.train.world_draw import BAND_HEIGHTS, CELL_CENTRES, DIAMETERS
from kelix_rt.train.world_scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, WORDS, Scene, Thing

# A token's labels: class 0 of the first four means that nothing of the kind lies there.
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, len(WORDS) + 1, len(BACKGROUNDS))
_SHAPE, _COLOUR, _SIZE, _WORD, _BACKGROUND = range(len(CLASSES))
# Half the box that a printed word fills, as fractions of the side.
_WORD_HALF_WIDTH, _WORD_HALF_HEIGHT = 0.3, 0.1


def token_labels(scene: Scene, side: int) -> Tensor:
    """int64 [side * side, 5], row by row: shape, colour, size, word and background of each token.

    side: tokens per row and column. A token belongs to the thing or word whose nominal box it
    touches; shifts and turns of the drawing are left aside.
    """
    labels = torch.zeros(side, side, len(CLASSES), dtype=torch.int64)
    labels[..., _BACKGROUND] = BACKGROUNDS.index(scene.background)
    for thing in scene.things:
        rows, columns = _touched(*CELL_CENTRES[thing.cell], *[DIAMETERS[thing.size] / 2] * 2, side)
        labels[rows, columns, :_WORD] = torch.tensor(_thing_classes(thing))
    if scene.word is not None:
        box = (0.5, BAND_HEIGHTS[scene.band], _WORD_HALF_WIDTH, _WORD_HALF_HEIGHT)
        labels[(*_touched(*box, side), _WORD)] = WORDS.index(scene.word) + 1
    return labels.flatten(0, 1)


class LabelHead(nn.Module):
    """Linear classifiers of `token_labels` over fused embeddings [T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(CLASSES))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, fused: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over tokens and kinds of label; labels int64 [T, 5]."""
        parts = self.linear(fused).float().split(CLASSES, dim=1)
        losses = [F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def right(self, fused: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of tokens labelled right by kind, of those where something of the kind lies."""
        found = {}
        parts = self.linear(fused).split(CLASSES, dim=1)
        for i, name in enumerate(("shape", "colour", "size", "word", "background")):
            there = labels[:, i] > 0 if i != _BACKGROUND else torch.ones_like(labels[:, i]) > 0
            hits = (parts[i].argmax(1) == labels[:, i])[there]
            if len(hits):
                found[name] = float(hits.float().mean())
        return found


def _thing_classes(thing: Thing) -> Sequence[int]:
    names = ((SHAPES, thing.shape), (COLOURS, thing.colour), (SIZES, thing.size))
    return [known.index(name) + 1 for known, name in names]


def _touched(
    x: float, y: float, half_width: float, half_height: float, side: int
) -> tuple[slice, slice]:
    """Rows and columns of the tokens that overlap a box around (x, y), in fractions of the side."""
    spans = []
    for centre, half in ((y, half_height), (x, half_width)):
        first = max(0, int((centre - half) * side))
        spans.append(slice(first, min(side, int((centre + half) * side) + 1)))
    return spans[0], spans[1]
