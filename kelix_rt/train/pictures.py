"""The training pictures as the later parts need them: codes and latents, computed once and kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kelix_rt.models.vae import to_uint8
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.processing import ImageProcessor
from kelix_rt.train.encoded import Batch, encoded
from kelix_rt.train.world import draw, make_scene
from kelix_rt.train.world_scene import Scene, odd, plain, strange

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

ALL_SCENES = 1_000_000  # train scenes that parts draw from which need no codes of them
_BATCH = 16
_KINDS = ("drawn", "plain", "strange", "odd")  # fields of `PictureCodes`


@dataclass(frozen=True)
class CodedPicture:
    """A picture as the language model meets it: global ids int64 [T, N], grid (1, h, w) patches."""

    ids: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class PictureCodes:
    """Codes of train pictures 0 .. count - 1.

    drawn: int16 [count, T, N] at the side that drawings have. plain: the same of the scenes without
    their nuisances (`plain`). strange: as drawn, of their strange twins (`strange_twin`). odd: as
    plain, of their odd ones (`odd_twin`).
    other: codes at one further side per picture: side -> int16 [pictures with this side, T', N];
    picture i has other_sides[i % len].
    to_ids: codes [T, N] -> ids of the unified vocabulary.
    """

    drawn: Tensor
    plain: Tensor
    strange: Tensor
    odd: Tensor
    other: Mapping[int, Tensor]
    side: int
    patch: int
    to_ids: Callable[[Tensor], Tensor]

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.drawn)

    def drawing(self, index: int) -> CodedPicture:
        """Picture `index` at the side that drawings have."""
        return self._coded(self.drawn[index], self.side)

    def answer(self, index: int) -> CodedPicture:
        """What a request for picture `index` is answered with: its scene, plain."""
        return self._coded(self.plain[index], self.side)

    def stranger(self, index: int) -> CodedPicture:
        """Its scene's strange twin."""
        return self._coded(self.strange[index], self.side)

    def odd_answer(self, index: int) -> CodedPicture:
        """What a request for its odd twin is answered with: the twin, plain."""
        return self._coded(self.odd[index], self.side)

    def seen(self, index: int, rng: random.Random) -> CodedPicture:
        """Picture `index` at any side: a third of the time not the one of drawings."""
        if not self.other or rng.random() < 2 / 3:
            return self.drawing(index)
        sides = list(self.other)
        side = sides[index % len(sides)]
        return self._coded(self.other[side][index // len(sides)], side)

    def _coded(self, codes: Tensor, side: int) -> CodedPicture:
        patches = side // self.patch
        return CodedPicture(self.to_ids(codes.long()), (1, patches, patches))


@dataclass(frozen=True)
class Subject:
    """One training scene with its coded pictures. codes: called when one of them is asked for."""

    scene: Scene
    codes: Callable[[], PictureCodes]
    index: int

    def drawing(self) -> CodedPicture:
        """The picture at the side that drawings have."""
        return self.codes().drawing(self.index)

    def answer(self) -> CodedPicture:
        """What a request for the scene is answered with."""
        return self.codes().answer(self.index)

    def stranger(self) -> tuple[Scene, CodedPicture]:
        """The scene's strange twin and its picture."""
        return strange_twin(self.scene), self.codes().stranger(self.index)

    def odd_answer(self) -> tuple[Scene, CodedPicture]:
        """The scene's odd twin and what a request for it is answered with."""
        return odd_twin(self.scene), self.codes().odd_answer(self.index)

    def seen(self, rng: random.Random) -> CodedPicture:
        """The picture at any side."""
        return self.codes().seen(self.index, rng)


def scene_of(index: int, seed: int) -> Scene:
    """The scene of training picture `index`."""
    return make_scene("train", index, seed)


def strange_twin(scene: Scene) -> Scene:
    """The scene with odd colours or else shapes, always the same."""
    return strange(scene, random.Random(f"strange {scene.variation}"))


def odd_twin(scene: Scene) -> Scene:
    """The scene with some things odd, always the same."""
    return odd(scene, random.Random(f"odd {scene.variation}"))


def encode_pictures(
    tokenizer: VisionTokenizer,
    images: ImageProcessor,
    count: int,
    side: int,
    other_sides: tuple[int, ...],
    vocab: int,
    seed: int,
    cache: Path,
) -> PictureCodes:
    """Codes of the first `count` train pictures, read from `cache` when it holds exactly them.

    vocab: number of text ids, in front of the codes in the unified vocabulary. Raises TrainingError
    when the cache cannot be written.
    """
    facts = {"side": side, "others": other_sides, "count": count, "seed": seed, "of": list(_KINDS)}

    def plan() -> list[Batch]:
        scenes = [scene_of(index, seed) for index in range(count)]
        twins = [strange_twin(scene) for scene in scenes]
        odd_ones = [plain(odd_twin(scene)) for scene in scenes]
        shown = (scenes, [*map(plain, scenes)], twins, odd_ones)
        views = [(kind, own, side) for kind, own in zip(_KINDS, shown, strict=True)]
        for number, length in enumerate(other_sides):
            views.append((f"other.{length}", scenes[number :: len(other_sides)], length))
        return [
            (name, partial(_codes, tokenizer, images, batch, length))
            for name, own, length in views
            for batch in _batches(own)
        ]

    stored = encoded(cache, facts, tokenizer, plan)
    other = {s: stored[f"other.{s}"] for s in other_sides if f"other.{s}" in stored}

    def to_ids(codes: Tensor) -> Tensor:
        return tokenizer.global_ids(codes, vocab).cpu()

    coded = {kind: stored[kind] for kind in _KINDS}
    return PictureCodes(**coded, other=other, side=side, patch=images.patch_size, to_ids=to_ids)


@torch.no_grad()
def encode_latents(vae: AutoencoderDC, count: int, side: int, seed: int, cache: Path) -> Tensor:
    """Latents bfloat16 [3 * count, C, h, w] in the DiT's scale, cached: of the train pictures as
    they are, of the same pictures plain, and of their strange twins."""

    def plan() -> list[Batch]:
        scenes = [scene_of(index, seed) for index in range(count)]
        shown = [*scenes, *map(plain, scenes), *map(strange_twin, scenes)]
        return [("latents", partial(_latents, vae, batch, side)) for batch in _batches(shown)]

    facts = {"side": side, "count": count, "seed": seed}
    return encoded(cache, facts, vae, plan)["latents"]


def to_pixels(pictures: list[object]) -> Tensor:
    """RGB pictures of one size -> float32 [B, 3, H, W] in -1..1."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in about -1..1 -> RGB pictures, the way back of `to_pixels`."""
    return [Image.fromarray(array) for array in to_uint8(pixels).cpu().numpy()]


@torch.no_grad()
def _codes(
    tokenizer: VisionTokenizer, images: ImageProcessor, scenes: Sequence[Scene], side: int
) -> Tensor:
    patches = [images.patchify(draw(scene, side)) for scene in scenes]
    pixels, grids = zip(*patches, strict=True)
    codes = tokenizer.encode(torch.cat(pixels), torch.cat(grids))
    return codes.view(len(scenes), -1, codes.shape[1]).to(torch.int16).cpu()


@torch.no_grad()
def _latents(vae: AutoencoderDC, scenes: Sequence[Scene], side: int) -> Tensor:
    parameter = next(vae.parameters())
    pixels = to_pixels([draw(scene, side) for scene in scenes])
    latent = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent
    return (latent.float() * vae.config.scaling_factor).bfloat16().cpu()


def _batches(scenes: Sequence[Scene]) -> Iterator[Sequence[Scene]]:
    return (scenes[start : start + _BATCH] for start in range(0, len(scenes), _BATCH))
