"""What the visual tokenizer learns from: pictures or close-ups, with all that is known of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kelix_rt.processing import ImageProcessor, TextTokenizer
from kelix_rt.train.close_ups import thing_windows, word_windows
from kelix_rt.train.reading import Reading, read_scene
from kelix_rt.train.token_labels import token_labels
from kelix_rt.train.world_draw import coverage, draw
from kelix_rt.train.world_scene import Scene


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
    """Views end to end, as the fields of `View` say; what is read from each, if anything."""

    patches: Tensor
    covered: Tensor
    grids: Tensor
    labels: Tensor
    readings: Sequence[Reading]

    @classmethod
    def of(cls, views: Sequence[View], readings: Sequence[Reading] = ()) -> PictureBatch:
        """Views in their order."""
        return cls(
            torch.cat([view.patches for view in views]),
            torch.cat([view.covered for view in views]),
            torch.cat([view.grid for view in views]),
            torch.cat([view.labels for view in views]),
            readings,
        )


class Views:
    """Makes batches on the CPU. text: with the special token <|im_end|>."""

    def __init__(self, images: ImageProcessor, text: TextTokenizer) -> None:
        self._images, self._text = images, text
        self._end_id = text.token_id("<|im_end|>")

    def pictures(
        self, scenes: Sequence[Scene], side: int, task: tuple[int, bool], rng: random.Random
    ) -> PictureBatch:
        """Whole pictures of one side in pixels.

        task: how many questions are asked of each, and whether a caption follows.
        """
        readings = [read_scene(scene, self._text, self._end_id, rng, *task) for scene in scenes]
        return PictureBatch.of([self._whole(scene, side) for scene in scenes], readings)

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
        covered, _ = self._images.patchify(coverage(scene, picture).convert("RGB"))
        return View(patches, covered[:, :1], grid, token_labels(scene, side // self._images.factor))
