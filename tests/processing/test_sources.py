"""load_image: every form of source, and a clear error for each that cannot be used."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kelix_rt.errors import InputError
from kelix_rt.processing import load_image
from kelix_rt.processing.sources import COMMON_FORMATS

PHOTO = Path(__file__).parents[2] / "kelix_rt" / "assets" / "photo.jpg"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "form",
    [
        lambda path: path,
        str,
        lambda path: f"file://{path}",
        Path.read_bytes,
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        Image.open,
        lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda path: "DATA:;base64," + base64.encodebytes(path.read_bytes()).decode(),
    ],
)
def test_every_form_gives_the_same_pixels(form: Callable[[Path], object], tmp_path: Path) -> None:
    image, path = noise(), tmp_path / "noise.png"
    image.save(path)
    loaded = load_image(form(path))  # type: ignore[arg-type]
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_photo_of_the_package() -> None:
    assert load_image(PHOTO).size == (320, 213)
    assert PHOTO.stat().st_size <= 40_000


def test_alpha_is_dropped_not_blended() -> None:
    rgba = noise(channels=4)
    expected = np.asarray(rgba)[..., :3]
    np.testing.assert_array_equal(np.asarray(load_image(encoded(rgba))), expected)


def test_palette_and_grey_are_expanded() -> None:
    palette = noise().quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(encoded(palette))), expected)
    grey = noise().convert("L")
    loaded = np.asarray(load_image(encoded(grey)))
    np.testing.assert_array_equal(loaded, np.repeat(np.asarray(grey)[..., None], 3, axis=2))


def test_of_16_bit_grey_the_upper_byte_counts() -> None:
    grey = np.asarray(noise().convert("L"))
    deep = Image.fromarray((grey.astype(np.uint16) << 8) + 99)
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(load_image(encoded(deep))), expected)
    np.testing.assert_array_equal(np.asarray(load_image(deep)), expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_an_agreed_white_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match=f"32-bit values \\(mode {mode}\\)"):
        load_image(Image.new(mode, (4, 4)))


def test_file_urls_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a b%.png"
    noise().save(path)
    assert load_image(path.as_uri()).size == noise().size
    assert load_image(path.as_uri().replace("file://", "file://localhost")).size == noise().size
    with pytest.raises(InputError, match="another machine, 'far'"):
        load_image("file://far/a.png")


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    assert load_image(encoded(noise(40, 30), "JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_named_as_such(kind: str) -> None:
    data = encoded(noise(200, 200), kind)
    with pytest.raises(InputError, match=r"damaged or truncated|not an image"):
        load_image(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_bytes_never_raise_anything_else(kind: str) -> None:
    data = encoded(noise(), kind)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            damaged[at] = int(rng.integers(0, 256))
        with contextlib.suppress(InputError):
            assert load_image(bytes(damaged), max_image_pixels=10**6).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("data:image/png,abc", "must read data:"),
        ("http://example.org/a.png", "the caller's job"),
        ("HTTPS://example.org/a.png", "the caller's job"),
        ("/no/such/file.png", "there is no file"),
        ("nul\0byte.png", "cannot be read"),
        (7, "got int"),
        (None, "got NoneType"),
        (Image.new("RGB", (0, 5)), "no pixels"),
    ],
)
def test_unusable_sources(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(source)  # type: ignore[arg-type]


def test_a_directory_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match="empty"):
        load_image(tmp_path / "empty.png")


def test_pixel_limit_is_checked_before_decoding() -> None:
    load_image(noise(40, 30), max_image_pixels=1200)
    with pytest.raises(InputError, match="40x30 = 1200 pixels, more than max_image_pixels=1199"):
        load_image(noise(40, 30), max_image_pixels=1199)


def test_decompression_bombs_are_refused() -> None:
    bomb = encoded(Image.new("1", (14000, 14000)))  # 30 kB, 196 million pixels
    with pytest.raises(InputError, match="too many pixels"):
        load_image(bomb)
    big = encoded(Image.new("1", (12000, 9000)))  # below Pillow's own limit, above ours
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(InputError, match="108000000"):
        load_image(big)


def test_aspect_ratio_is_limited() -> None:
    assert load_image(Image.new("RGB", (200, 1))).size == (200, 1)
    with pytest.raises(InputError, match="at most 200 times"):
        load_image(Image.new("RGB", (1, 201)))


def test_files_can_be_switched_off() -> None:
    for source in (PHOTO, str(PHOTO), f"file://{PHOTO}"):
        with pytest.raises(InputError, match="switched off"):
            load_image(source, allow_files=False)
    assert load_image(PHOTO.read_bytes(), allow_files=False).size == (320, 213)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "EPS"])
def test_strangers_have_the_common_formats(kind: str) -> None:
    data = encoded(noise(), kind)
    if kind in COMMON_FORMATS:
        assert load_image(data, allow_files=False).size == (40, 30)
    else:
        with pytest.raises(InputError, match="is not an image Pillow can read"):
            load_image(data, allow_files=False)
