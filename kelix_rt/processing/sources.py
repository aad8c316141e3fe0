"""Open an image that a user handed over, whatever form it came in."""

from __future__ import annotations

import base64
import binascii
import io
import os
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from kelix_rt.errors import InputError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image

MAX_IMAGE_PIXELS = 100_000_000
MAX_ASPECT = 200
# Of strangers: Pillow opens many more, some by running another program (Ghostscript).
COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def load_image(
    source: ImageSource,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    allow_files: bool = True,
) -> Image.Image:
    """Return `source` as an RGB PIL image, checked before its pixels are decoded.

    source: a path, a `file://` or base64 `data:` URL, the encoded bytes, or a PIL image. Of an
    animation the first frame counts, of 16-bit grey the upper byte. Alpha is dropped (not
    blended), palette and grey images are expanded, and the EXIF orientation is not applied, as in
    training.
    max_image_pixels: largest width * height accepted, in pixels.
    allow_files: False refuses paths, `file://` URLs and all but the COMMON_FORMATS, for sources
    that come from strangers.

    Raises InputError for anything that cannot be read as an image, has no pixels, more than
    `max_image_pixels`, or one side more than 200 times the other.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", max_image_pixels)
    data, name = _read(source, allow_files)
    if not data:
        raise InputError(f"load_image: {name} is empty (0 bytes); expected an encoded image")
    try:
        image = Image.open(io.BytesIO(data), formats=None if allow_files else COMMON_FORMATS)
    except Image.DecompressionBombError as error:
        raise InputError(f"load_image: {name} has too many pixels to be opened: {error}") from error
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them to
        raise InputError(f"load_image: {name} is not an image Pillow can read: {error}") from error
    with image:
        return _decode(image, name, max_image_pixels)


def _decode(image: Image.Image, name: str, max_image_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"load_image: {name} has no pixels, its size is {width}x{height}")
    if width * height > max_image_pixels:
        raise InputError(
            f"load_image: {name} is {width}x{height} = {width * height} pixels, more than "
            f"max_image_pixels={max_image_pixels}; scale it down or raise the limit"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"load_image: {name} is {width}x{height}; the longer side may be at most "
            f"{MAX_ASPECT} times the shorter one"
        )
    try:
        return _to_rgb(image, name)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        raise InputError(f"load_image: {name} is damaged or truncated: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Three bytes a pixel. Of 16-bit grey Pillow would make white: it cuts values off at 255."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if sixteen:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"load_image: {name} has 32-bit values (mode {image.mode}), of which none is agreed to "
            "be white; scale them to 0..255 and pass an image of bytes"
        )
    return image.convert("RGB")


def _read(source: object, allow_files: bool) -> tuple[bytes, str]:
    """The encoded bytes of `source`, and what to call it in an error."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), "the image data"
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            raise InputError(
                f"load_image: {_short(source)!r} is a web address; fetching it is the caller's "
                "job, pass the bytes, a data: URL or a path"
            )
        if scheme.startswith("data:"):
            return _read_data_url(source), "the data: URL"
        if scheme.startswith("file://"):
            source = _file_path(source)
    elif not isinstance(source, os.PathLike):
        raise InputError(
            "load_image: expected a path, a data: URL, bytes or a PIL image, got "
            f"{type(source).__name__}"
        )
    if not allow_files:
        raise InputError(
            f"load_image: reading files is switched off here, got {_short(str(source))!r}; "
            "pass the image as a base64 data: URL"
        )
    return _read_file(Path(source))


def _file_path(url: str) -> str:
    host, path = urlsplit(url)[1:3]
    if host not in ("", "localhost"):
        raise InputError(f"load_image: {_short(url)} names another machine, {host!r}; pass a path")
    return unquote(path)


def _read_file(path: Path) -> tuple[bytes, str]:
    name = _short(str(path))
    try:
        return path.read_bytes(), name
    except FileNotFoundError as error:
        raise InputError(f"load_image: there is no file {name}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"load_image: {name} cannot be read: {error}") from error


def _read_data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InputError(
            "load_image: a data: URL must read data:<type>;base64,<data>, got one that starts "
            f"with {_short(url, 40)!r}"
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"load_image: the data: URL is not valid base64: {error}") from error


def _short(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
