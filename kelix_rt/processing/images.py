"""Images to patches: the two resizes of the Kelix input pipeline, normalisation and patchify.

The released pipeline resizes twice: once when the image is fetched (stage A, limits of the
request) and once in the checkpoint's image processor (stage B, limits of
`preprocessor_config.json`). Both are kept, because two resamplings are not one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kelix_rt.errors import ConfigError, InputError
from kelix_rt.processing.sources import MAX_ASPECT, MAX_IMAGE_PIXELS, ImageSource, load_image

CONFIG_NAME = "preprocessor_config.json"
# Stage A's defaults in keye_vl_utils, as counts of 28x28 pixels: 4 and 20480 tokens.
FETCH_MIN_PIXELS = 4 * 28 * 28
FETCH_MAX_PIXELS = 20480 * 28 * 28
# What the release's processor takes where its file names none: CLIP's mean and standard deviation.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def fetch_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Stage A: the (height, width) in pixels an image is fetched at.

    Both are multiples of `factor` near the given size, their product lies within the limits where
    the aspect ratio allows it, and neither is 0. Raises InputError for an aspect ratio above 200.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"fetch_size: the longer side may be at most {MAX_ASPECT} times the shorter one, got "
            f"{width}x{height}"
        )
    rounded = max(factor, _nearest(height, factor)), max(factor, _nearest(width, factor))
    new_height, new_width = _within(rounded, (height, width), factor, (min_pixels, max_pixels))
    return max(new_height, factor), max(new_width, factor)


def processor_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Stage B: the (height, width) in pixels the checkpoint's image processor resizes to.

    As `fetch_size`, but sides below `factor` are first scaled up, the aspect ratio is free, and a
    side may come out as 0 where `max_pixels` leaves no room for it.
    """
    if height < factor:
        height, width = factor, round(width * factor / height)
    if width < factor:
        height, width = round(height * factor / width), factor
    rounded = _nearest(height, factor), _nearest(width, factor)
    return _within(rounded, (height, width), factor, (min_pixels, max_pixels))


def _nearest(length: int, factor: int) -> int:
    return round(length / factor) * factor  # half to even, as the training pipeline


def _within(
    rounded: tuple[int, int], given: tuple[int, int], factor: int, limits: tuple[int, int]
) -> tuple[int, int]:
    """`rounded` if its area lies within the limits, else the given size scaled to the limit."""
    height, width = given
    min_pixels, max_pixels = limits
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            math.floor(height / shrink / factor) * factor,
            math.floor(width / shrink / factor) * factor,
        )
    if area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return (
            math.ceil(height * grow / factor) * factor,
            math.ceil(width * grow / factor) * factor,
        )
    return rounded


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images into `pixel_values` and `image_grid_thw` as the checkpoint expects them.

    Field names are those of `preprocessor_config.json`; the defaults are those of the published
    Keye-VL processor. Pixel limits count pixels, patch_size is in pixels, merge_size in patches.
    fetch_min_pixels / fetch_max_pixels are stage A's limits for requests that name none, and
    max_image_pixels is the largest image opened at all. position_markers: template of the text
    that the model was trained to find in front of each row of tokens (see `PositionMarkers`).
    """

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 1003520
    resample: int = Image.Resampling.BICUBIC
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fetch_min_pixels: int = FETCH_MIN_PIXELS
    fetch_max_pixels: int = FETCH_MAX_PIXELS
    max_image_pixels: int = MAX_IMAGE_PIXELS
    position_markers: str | None = None
    _table: NDArray[np.float32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "min_pixels", "fetch_min_pixels"):
            _require(name, getattr(self, name), "must be a positive integer", _is_count)
        _require("max_image_pixels", self.max_image_pixels, "must be a positive integer", _is_count)
        for low, high in (("min_pixels", "max_pixels"), ("fetch_min_pixels", "fetch_max_pixels")):
            least = getattr(self, low)
            _require(
                high,
                getattr(self, high),
                f"must be an integer of at least {low}={least}",
                lambda value, least=least: _is_count(value) and value >= least,
            )
        known = [int(item) for item in Image.Resampling]
        _require("resample", self.resample, f"must be one of {known}", lambda v: v in known)
        for name in ("image_mean", "image_std"):
            _require(name, getattr(self, name), "must be a tuple of 3 numbers", _is_colour)
        _require("image_std", self.image_std, "must be above 0", lambda v: min(v) > 0)
        object.__setattr__(self, "_table", self._pixel_table())

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> ImageProcessor:
        """Read `preprocessor_config.json` in directory `path`; fields it lacks take the defaults,
        image_mean and image_std those of CLIP.

        A directory without the file (a bare tokenizer checkpoint) gets the defaults. `overrides`
        are fields of this class and win over the file. Raises ConfigError for broken JSON, a bad
        value, or a step (resize, rescale, normalise) that the file switches off.
        """
        file = Path(path) / CONFIG_NAME
        values: Mapping[str, Any] = {}
        if file.is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{file}: not valid JSON: {error}") from error
            if not isinstance(values, dict):
                raise ConfigError(f"{file}: expected a JSON object, got {type(values).__name__}")
            values = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, **values}
        for switch in ("do_resize", "do_rescale", "do_normalize"):
            if not values.get(switch, True):
                raise ConfigError(f"{file}: {switch}=false is not supported; it must be true")
        if values.get("temporal_patch_size", 1) != 1:
            raise ConfigError(
                f"{file}: temporal_patch_size must be 1, got {values['temporal_patch_size']}"
            )
        names = {item.name for item in fields(cls) if item.init}
        chosen = {k: v for k, v in values.items() if k in names and v is not None} | overrides
        for name in ("image_mean", "image_std"):
            if isinstance(chosen.get(name), list):
                chosen[name] = tuple(chosen[name])
        return cls(**chosen)

    @property
    def factor(self) -> int:
        """Pixels along the side of one token: patch_size * merge_size."""
        return self.patch_size * self.merge_size

    def load_image(self, source: ImageSource, allow_files: bool = True) -> Image.Image:
        """`kelix_rt.processing.load_image` under this processor's `max_image_pixels`."""
        return load_image(source, self.max_image_pixels, allow_files)

    def resize(
        self,
        image: Image.Image,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Image.Image:
        """Both resizes of an RGB image: the result has sides that are multiples of `factor`.

        min_pixels (at most fetch_max_pixels), max_pixels: stage A's limits for this image; size:
        (height, width) in pixels wanted instead, rounded to multiples of `factor`. Stage B's limits
        hold in any case. Raises InputError for bad limits and aspect ratios.
        """
        low, high = self._limits(min_pixels, max_pixels)
        height, width = (image.height, image.width) if size is None else _pair(size)
        if height < 1 or width < 1:
            raise InputError(f"resize: the size must be at least 1x1 pixel, got {width}x{height}")
        if size is not None:
            low, high = self.fetch_min_pixels, self.fetch_max_pixels
        height, width = fetch_size(height, width, self.factor, low, high)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        height, width = processor_size(height, width, self.factor, self.min_pixels, self.max_pixels)
        if not height or not width:
            raise InputError(
                f"resize: an image of {image.width}x{image.height} does not fit max_pixels="
                f"{self.max_pixels}: a side would be 0; use a less elongated image"
            )
        if (width, height) == image.size:
            return image
        return image.resize((width, height), Image.Resampling(self.resample))

    def patchify(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise an RGB image and cut it into patches, row by row (raster order).

        Sides must be multiples of `factor`. Returns float32 [h*w, 3, patch, patch] and the int64
        grid [1, 3] = (1, h, w), counted in patches.
        """
        if image.width % self.factor or image.height % self.factor:
            raise InputError(
                f"patchify: the sides must be multiples of {self.factor} pixels, got "
                f"{image.width}x{image.height}; resize the image first"
            )
        patch = self.patch_size
        rows, columns = image.height // patch, image.width // patch
        pixels = np.asarray(image.convert("RGB")).reshape(rows, patch, columns, patch, 3)
        pixels = pixels.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, patch, patch)
        values = np.empty(pixels.shape, dtype=np.float32)
        for channel in range(3):
            values[:, channel] = self._table[channel][pixels[:, channel]]
        return torch.from_numpy(values), torch.tensor([[1, rows, columns]], dtype=torch.int64)

    def preprocess(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Load, resize and patchify one image or several, the options being those of `resize`.

        Returns pixel_values float32 [N, 3, patch, patch], the images' patches one after another,
        and image_grid_thw int64 [n, 3]. Raises InputError for images that cannot be used.
        """
        single = isinstance(images, (str, bytes, bytearray, memoryview))
        several = isinstance(images, Sequence) and not single
        sources: list[Any] = [*images] if several else [images]  # type: ignore[misc]
        if not sources:
            raise InputError("preprocess: expected at least one image, got none")
        options: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels, "size": size}
        parts = [self.patchify(self.resize(self.load_image(s), **options)) for s in sources]
        return torch.cat([values for values, _ in parts]), torch.cat([grid for _, grid in parts])

    def num_tokens(self, grid: torch.Tensor | Sequence[int]) -> int:
        """Image tokens of `grid`, one (t, h, w) or [n, 3] of them, counted in patches."""
        rows = torch.as_tensor(grid).reshape(-1, 3)
        return int(rows.prod(dim=1).sum()) // self.merge_size**2

    def _limits(self, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
        low = self.fetch_min_pixels if min_pixels is None else min_pixels
        high = self.fetch_max_pixels if max_pixels is None else max_pixels
        crossed = low > high and None not in (min_pixels, max_pixels)
        if not 1 <= low <= self.fetch_max_pixels or high < 1 or crossed:
            raise InputError(
                f"resize: 1 <= min_pixels <= {self.fetch_max_pixels}, 1 <= max_pixels and, where "
                f"both are given, min_pixels <= max_pixels must hold, got {low} and {high}"
            )
        return low, high

    def _pixel_table(self) -> NDArray[np.float32]:
        """float32 [3, 256]: the normalised value of every byte, rounded as the release does:
        the rescaling in float64 with one rounding, the normalisation in float32."""
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.asarray(self.image_mean, dtype=np.float32)[:, None]
        std = np.asarray(self.image_std, dtype=np.float32)[:, None]
        return (scaled - mean) / std


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(v, Integral) for v in size):
        return int(size[0]), int(size[1])
    raise InputError(f"resize: size must be two integers, (height, width), got {size!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_colour(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and all(isinstance(v, (int, float)) for v in value)
    )


def _require(name: str, value: Any, rule: str, holds: Any) -> None:
    if not holds(value):
        raise ConfigError(f"ImageProcessor: {name} {rule}, got {value!r}")
