"""ImageProcessor against the reference's tables, resizes, patches and pixel values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from kelix_rt.errors import ConfigError, InputError
from kelix_rt.processing import ImageProcessor
from kelix_rt.processing.images import fetch_size, processor_size

TOKEN = 28 * 28
FETCH = {
    "utils_default": (4 * TOKEN, 20160 * TOKEN),
    "utils_720tok": (4 * TOKEN, 720 * TOKEN),
    "utils_32_1280": (32 * TOKEN, 1280 * TOKEN),
}
PROCESSOR = {"proc_3136_1003520": (3136, 1003520), "proc_102400_1003520": (102400, 1003520)}


@pytest.fixture(scope="module")
def ops(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "tokenizer" / "ops" / "ops.safetensors")


def pil(rgb: torch.Tensor) -> Image.Image:
    return Image.fromarray(rgb.numpy())


def test_sizes_equal_the_tables(golden: Path) -> None:
    cases = json.loads((golden / "tokenizer/ops/smart_resize.json").read_text())["cases"]
    assert len(cases) > 20
    for case in cases:
        for size, table in ((fetch_size, FETCH), (processor_size, PROCESSOR)):
            for key, limits in table.items():
                got = size(case["h"], case["w"], 28, *limits)
                assert list(got) == case[key], (key, case)


# From 8 tokens on: growing a tiny image to the minimum of 4 rounds both sides up, to 8 at most.
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 4000))
def test_fetched_sizes_are_usable(height: int, width: int, tokens: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="at most 200 times"):
            fetch_size(height, width, 28, 4 * TOKEN, tokens * TOKEN)
        return
    new_height, new_width = fetch_size(height, width, 28, 4 * TOKEN, tokens * TOKEN)
    assert new_height % 28 == 0 and new_width % 28 == 0
    assert min(new_height, new_width) >= 28
    if min(new_height, new_width) > 28:
        assert new_height * new_width <= tokens * TOKEN


def test_the_first_resize_equals_the_reference(ops: dict[str, torch.Tensor]) -> None:
    expected = ops["resize.bicubic"]
    resized = ImageProcessor().resize(pil(ops["resize.rgb_in"]), size=tuple(expected.shape[:2]))
    np.testing.assert_array_equal(np.asarray(resized), expected.numpy())


def test_the_bilinear_filter_equals_the_reference(ops: dict[str, torch.Tensor]) -> None:
    expected = ops["resize.bilinear"]
    size = (expected.shape[1], expected.shape[0])
    resized = pil(ops["resize.rgb_in"]).resize(size, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(resized), expected.numpy())


def test_the_second_resize_uses_the_configured_filter() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
        processor = ImageProcessor(max_pixels=56 * 56, resample=int(resample))
        expected = image.resize((56, 56), resample)
        np.testing.assert_array_equal(np.asarray(processor.resize(image)), np.asarray(expected))


def test_large_images_are_resampled_twice() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    bicubic = Image.Resampling.BICUBIC
    expected = image.resize((1036, 1036), bicubic).resize((980, 980), bicubic)
    resized = ImageProcessor().resize(image)
    np.testing.assert_array_equal(np.asarray(resized), np.asarray(expected))
    assert ImageProcessor(max_pixels=2_000_000).resize(image).size == (1036, 1036)


def test_patches_equal_the_reference(ops: dict[str, torch.Tensor]) -> None:
    values, grid = ImageProcessor().patchify(pil(ops["patchify.rgb"]))
    assert values.dtype == torch.float32 and grid.dtype == torch.int64
    assert torch.equal(values, ops["patchify.pixel_values"])
    assert grid.tolist() == [ops["patchify.grid"].tolist()]


def test_pixel_values_of_every_byte(ops: dict[str, torch.Tensor]) -> None:
    ramp = np.zeros((28, 28, 3), dtype=np.uint8)
    ramp.reshape(-1, 3)[:256] = np.arange(256, dtype=np.uint8)[:, None]
    values, _ = ImageProcessor().patchify(Image.fromarray(ramp))
    rows = values.reshape(2, 2, 3, 14, 14).permute(0, 3, 1, 4, 2).reshape(-1, 3)[:256]
    for channel in range(3):
        assert torch.equal(rows[:, channel], ops["pixel_lut"])


# Before 13, Pillow shrank both sides in the other order, with another rounding in between.
PILLOW_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".", maxsplit=1)[0]) < 13, reason="the golden resize is Pillow 13's"
)


@pytest.mark.parametrize("name", ["tok_a", pytest.param("tok_b", marks=PILLOW_13)])
def test_pixel_values_equal_the_reference(golden: Path, name: str) -> None:
    fixtures = load_file(golden / "tokenizer" / name / "fixtures.safetensors")
    images = [pil(fixtures[key]) for key in sorted(k for k in fixtures if k.endswith("_rgb"))]
    assert len(images) > 1
    values, grid = ImageProcessor().preprocess(images)
    assert torch.equal(grid, fixtures["image_grid_thw"][: len(images)])
    assert torch.equal(values, fixtures["pixel_values"][: len(values)])


def test_the_circle_of_the_released_tokenizer(golden: Path) -> None:
    fixtures = load_file(golden / "tokenizer/ops/circle100_real_checkpoint.safetensors")
    processor = ImageProcessor()
    resized = processor.resize(pil(fixtures["rgb"]))
    np.testing.assert_array_equal(np.asarray(resized), fixtures["resized_rgb"].numpy())
    _, grid = processor.patchify(resized)
    assert torch.equal(grid, fixtures["image_grid_thw"])
    assert processor.num_tokens(grid) == len(fixtures["expected_global_ids"]) == 16


def test_limits_of_a_request() -> None:
    processor, image = ImageProcessor(), Image.new("RGB", (1000, 1000))
    assert processor.resize(image, max_pixels=720 * TOKEN).size == (728, 728)
    assert processor.resize(Image.new("RGB", (56, 56)), min_pixels=32 * TOKEN).size == (168, 168)
    assert processor.resize(image, size=(504, 500)).size == (504, 504)
    assert processor.resize(image, max_pixels=1000).size == (56, 56)  # stage B grows it again
    assert processor.resize(image, max_pixels=10**9).size == (980, 980)
    for limits in (
        {"min_pixels": 0},
        {"max_pixels": 0},
        {"min_pixels": 10**9},
        {"min_pixels": 5000, "max_pixels": 4000},
    ):
        with pytest.raises(InputError, match="must hold"):
            processor.resize(image, **limits)
    with pytest.raises(InputError, match="at least 1x1"):
        processor.resize(image, size=(0, 28))
    for size in (56, "56", (float("nan"), 56), (1, 2, 3)):
        with pytest.raises(InputError, match="size must be two integers"):
            processor.resize(image, size=size)


def test_an_image_too_long_for_the_limit_is_refused() -> None:
    with pytest.raises(InputError, match="a side would be 0"):
        ImageProcessor(max_pixels=12544).preprocess(Image.new("RGB", (2800, 28)))


def test_preprocess_takes_one_image_or_several() -> None:
    processor = ImageProcessor()
    one, two = Image.new("RGB", (56, 84), "red"), Image.new("RGB", (84, 56), "blue")
    single, grid = processor.preprocess(one)
    assert grid.tolist() == [[1, 6, 4]] and single.shape == (24, 3, 14, 14)
    both, grids = processor.preprocess([one, two])
    assert grids.tolist() == [[1, 6, 4], [1, 4, 6]]
    assert torch.equal(both[:24], single)
    assert processor.num_tokens(grids) == 12 and processor.num_tokens((1, 6, 4)) == 6
    with pytest.raises(InputError, match="at least one image"):
        processor.preprocess([])
    with pytest.raises(InputError, match="multiples of 28"):
        processor.patchify(Image.new("RGB", (56, 57)))


def test_the_pixel_limit_is_a_field() -> None:
    with pytest.raises(InputError, match="max_image_pixels=99"):
        ImageProcessor(max_image_pixels=99).preprocess(Image.new("RGB", (10, 10)))


def test_from_pretrained(tmp_path: Path, golden: Path) -> None:
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor()
    tiny = ImageProcessor.from_pretrained(golden / "llm" / "tiny_a")
    assert (tiny.min_pixels, tiny.max_pixels) == (3136, 12544)
    _, grid = tiny.preprocess(Image.new("RGB", (640, 480)))
    assert 4 <= tiny.num_tokens(grid) <= 16
    file = tmp_path / "preprocessor_config.json"
    file.write_text(
        json.dumps({"max_pixels": 5000, "image_std": [0.5, 0.25, 0.5], "auto_map": {}, "size": 1})
    )
    read = ImageProcessor.from_pretrained(tmp_path, min_pixels=4000)
    assert read.image_mean == (0.48145466, 0.4578275, 0.40821073)  # the release's processor's own
    assert (read.min_pixels, read.max_pixels, read.image_std) == (4000, 5000, (0.5, 0.25, 0.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"do_normalize": false}', "do_normalize"),
        ('{"temporal_patch_size": 2}', "temporal_patch_size"),
        ('{"patch_size": 0}', "patch_size"),
        ('{"min_pixels": 9999999}', "max_pixels must be an integer of at least"),
        ('{"resample": 17}', "resample"),
        ('{"image_mean": 0.5}', "image_mean"),
        ('{"image_std": [0.5, 0, 0.5]}', "image_std"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", [None, 5, np.zeros((8, 8, 3), dtype=np.uint8)])
def test_what_is_no_image_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match="expected a path"):
        ImageProcessor().preprocess(source)
