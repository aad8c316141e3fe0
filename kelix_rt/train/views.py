"""What the visual tokenizer learns from: pictures or close-ups, with all that is known of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kelix_rt.processing import ImageProcessor, TextTokenizer
from kelix_rt.train.close_ups import thing_windows, word_windows
from kelix_rt.train.reading import Reading, read_scene
from kelix_rt.train.token_labels import token_labels
from kelix_rt.train.world_draw import coverage, draw
from kelix_rt.train.world_scene import CELLS, Scene, plain
from kelix_rt.train.world_splits import split_of

ALIKE = 12


@dataclass(frozen=True)
class View:
    """A picture or a part of one: patches [n, 3, P, P] and their grid int64 [1, 3].

    covered: [n, 1, P, P], 1 where something is drawn and -1 elsewhere. labels: int64 [n / 4, 6],
    see `token_labels`.
    """

    patches: Tensor
    covered: Tensor
    grid: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PictureBatch:
    """Views end to end, as the fields of `View` say; what is read from the first of them, if
    anything. twins: int64 [m, 2], pairs of tokens that should have the same codes."""

    patches: Tensor
    covered: Tensor
    grids: Tensor
    labels: Tensor
    readings: Sequence[Reading]
    twins: Tensor

    @classmethod
    def of(
        cls,
        views: Sequence[View],
        readings: Sequence[Reading] = (),
        twins: Tensor | None = None,
    ) -> PictureBatch:
        """Views in their order."""
        return cls(
            torch.cat([view.patches for view in views]),
            torch.cat([view.covered for view in views]),
            torch.cat([view.grid for view in views]),
            torch.cat([view.labels for view in views]),
            readings,
            torch.empty(0, 2, dtype=torch.int64) if twins is None else twins,
        )


def equal_tokens(views: Sequence[View], rng: random.Random) -> Tensor:
    """int64 [m, 2]: pairs of tokens of the same pixels, at any place of any of the views.

    Of tokens of the same pixels `ALIKE` at most are taken, each into two pairs: else nearly all
    pairs would be of empty tokens.
    """
    pixels = torch.cat([_token_pixels(view) for view in views])
    kinds = torch.unique(pixels, dim=0, return_inverse=True)[1].tolist()
    alike: dict[int, list[int]] = {}
    for token in rng.sample(range(len(kinds)), len(kinds)):
        alike.setdefault(kinds[token], []).append(token)
    rings = [tokens[:ALIKE] for tokens in alike.values() if len(tokens) > 1]
    pairs = [pair for ring in rings for pair in zip(ring, ring[1:] + ring[:1], strict=True)]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _token_pixels(view: View) -> Tensor:
    """[tokens, 4 * 3 * P * P] in the order of the labels."""
    _, rows, columns = view.grid[0].tolist()
    flat = view.patches.flatten(1).view(rows // 2, 2, columns // 2, 2, -1)
    return flat.transpose(1, 2).flatten(2).flatten(0, 1)


class Views:
    """Makes batches on the CPU. text: with the special token <|im_end|>."""

    def __init__(self, images: ImageProcessor, text: TextTokenizer) -> None:
        self._images, self._text = images, text
        self._end_id = text.token_id("<|im_end|>")

    def pictures(
        self,
        scenes: Sequence[Scene],
        unread: Sequence[Scene],
        side: int,
        task: tuple[int, bool],
        rng: random.Random,
        twins: bool = False,
    ) -> PictureBatch:
        """Whole pictures of one side in pixels: first those that are read, then `unread` ones.

        task: how many questions are asked of each, and whether a caption follows. twins: half of
        those that are read are plain, and behind all pictures stand unread ones of things of theirs
        at other places; tokens of the same pixels are paired.
        """
        plains = [plain(scene) for scene in scenes[: len(scenes) // 2]] if twins else []
        scenes = [*plains, *scenes[len(plains) :]]
        moved = [_moved(scene, rng) for scene in plains]
        views = [self._whole(scene, side) for scene in (*scenes, *unread, *moved)]
        readings = self._readings(scenes, task, rng)
        return PictureBatch.of(views, readings, equal_tokens(views, rng) if twins else None)

    def _readings(
        self, scenes: Sequence[Scene], task: tuple[int, bool], rng: random.Random
    ) -> list[Reading]:
        return [read_scene(scene, self._text, self._end_id, rng, *task) for scene in scenes]

    def close_ups(
        self, scenes: Iterator[Scene], count: int, side: int, rng: random.Random
    ) -> PictureBatch:
        """`count` windows of pictures, half around things and half around words; nothing is read.

        scenes: as many as it takes.
        """
        tokens = side // self._images.factor
        found: list[View] = []
        for windows_of in (thing_windows, word_windows):
            wanted = len(found) + count // 2
            while len(found) < wanted:
                scene = next(scenes)
                windows = windows_of(scene, tokens, rng)[: wanted - len(found)]
                if windows:
                    whole = self._whole(scene, side)
                    found += [
                        View(
                            window.patches(whole.patches, tokens),
                            window.patches(whole.covered, tokens),
                            torch.tensor([window.grid]),
                            window.tokens(whole.labels, tokens),
                        )
                        for window in windows
                    ]
        return PictureBatch.of(found)

    def _whole(self, scene: Scene, side: int) -> View:
        picture = draw(scene, side)
        patches, grid = self._images.patchify(picture)
        covered = _patches_of_mask(coverage(scene, picture), self._images.patch_size)
        return View(patches, covered, grid, token_labels(scene, side // self._images.factor))


def _patches_of_mask(mask: Image.Image, patch: int) -> Tensor:
    """float32 [n, 1, patch, patch] of a mode L mask, 1 where it is white and -1 elsewhere."""
    rows, columns = mask.height // patch, mask.width // patch
    white = torch.from_numpy(np.asarray(mask) > 0).view(rows, patch, columns, patch)
    return white.transpose(1, 2).reshape(-1, 1, patch, patch).float() * 2 - 1


def _moved(scene: Scene, rng: random.Random) -> Scene:
    """Some of the things of a scene, at least one where there are any, in other corners; its word
    stays or goes. What comes of it belongs to train."""
    while split_of(moved := _any_moved(scene, rng)) != "train":
        pass
    return moved


def _any_moved(scene: Scene, rng: random.Random) -> Scene:
    word = scene.word if rng.random() < 0.5 else None
    corners = [c for c in CELLS[:4] if word is None or not c.startswith(scene.band)]
    most = min(len(scene.things), len(corners))
    kept = rng.sample(scene.things, rng.randint(min(1, most), most))
    cells = rng.sample(corners, len(kept))
    things = tuple(replace(thing, cell=cell) for thing, cell in zip(kept, cells, strict=True))
    return replace(scene, things=things, word=word)
