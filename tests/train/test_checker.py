"""The checker against scenes it did not draw itself into memory: accuracy, and that it says no."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from kelix_rt.errors import InputError
from kelix_rt.train.checker import judge, read_picture
from kelix_rt.train.likeness import UNKNOWN
from kelix_rt.train.world_draw import COLOUR_VALUES, draw
from kelix_rt.train.world_scene import COLOURS, SHAPES, WORDS, Scene, Thing
from kelix_rt.train.world_splits import make_scenes

SCENE = Scene(
    (Thing("ring", "red", "small", "top left"), Thing("star", "blue", "large", "top right")),
    "tan",
    word="boat",
    band="bottom",
)
ATTRIBUTES = (
    *("count", "object", "background", "word", "no word", "shape", "colour", "size", "location"),
    "relation",
)


def as_drawn(picture: Image.Image) -> Image.Image:
    return picture


def blurred_and_noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), dtype=float)
    noise = np.random.default_rng(3).normal(0, 8, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def compressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize(
    ("degrade", "least"), [(as_drawn, 0.99), (blurred_and_noisy, 0.97), (compressed, 0.97)]
)
@pytest.mark.parametrize("side", [112, 256])
def test_accuracy(degrade: Callable[[Image.Image], Image.Image], least: float, side: int) -> None:
    right: Counter = Counter()
    total: Counter = Counter()
    for split in ("train", "test"):
        for scene in make_scenes(split, 75, seed=9):  # type: ignore[arg-type]
            verdict = judge(scene, degrade(draw(scene, side)))
            total.update(verdict.keys())
            right.update(name for name, ok in verdict.items() if ok)
    assert set(total) == set(ATTRIBUTES)
    assert {n: right[n] / total[n] for n in total if right[n] / total[n] < least} == {}


def test_reading_gives_places_and_sizes() -> None:
    seen = read_picture(draw(SCENE, 224))
    assert (seen.background, seen.word) == ("tan", "boat")
    by_shape = {thing.shape: thing for thing in seen.things}
    ring, star = by_shape["ring"], by_shape["star"]
    assert (ring.look, ring.size, ring.cell) == (("red", "ring"), "small", "top left")
    assert (star.look, star.size, star.cell) == (("blue", "star"), "large", "top right")
    assert ring.diameter == pytest.approx(0.2, rel=0.12)
    assert star.centre == pytest.approx((0.74, 0.26), abs=0.05)


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (replace(SCENE, word="book"), {"word"}),
        (replace(SCENE, word=None), {"word"}),
        (replace(SCENE, background="gray"), {"background"}),
        (
            replace(SCENE, things=(replace(SCENE.things[0], colour="pink"), SCENE.things[1])),
            {"colour", "object", "relation"},
        ),
        (
            replace(SCENE, things=(replace(SCENE.things[0], shape="circle"), SCENE.things[1])),
            {"shape", "object", "relation"},
        ),
        (
            replace(SCENE, things=(replace(SCENE.things[0], size="large"), SCENE.things[1])),
            {"size"},
        ),
        (
            replace(SCENE, things=SCENE.things[:1]),
            {"count", "shape", "colour", "object", "size", "location", "relation"},
        ),
    ],
)
def test_judge_finds_what_is_wrong(other: Scene, wrong: set[str]) -> None:
    verdict = judge(SCENE, draw(other))
    assert {name for name, ok in verdict.items() if not ok} == wrong


def test_mirrored_picture_has_the_wrong_relation() -> None:
    scene = replace(SCENE, word=None)
    verdict = judge(scene, ImageOps.mirror(draw(scene)))
    assert not verdict["relation"] and verdict["count"] and verdict["object"]


def test_swapped_colours_are_a_wrong_object_only() -> None:
    ring, star = SCENE.things
    swapped = (replace(ring, colour=star.colour), replace(star, colour=ring.colour))
    verdict = judge(SCENE, draw(replace(SCENE, things=swapped)))
    assert verdict["shape"] and verdict["colour"]
    assert not verdict["object"] and not verdict["relation"]


def test_every_shape_and_colour_is_told_apart_at_the_smallest_size() -> None:
    for shape in SHAPES:
        for colour in COLOURS:
            scene = Scene((Thing(shape, colour, "small", "center"),), "gray")
            (seen,) = read_picture(blurred_and_noisy(draw(scene))).things
            assert seen.look == (colour, shape)


def test_every_word_is_read() -> None:
    for number, word in enumerate(WORDS):
        scene = Scene((), "navy", word, "center", variation=number)
        assert read_picture(blurred_and_noisy(draw(scene))).word == word


def pure_noise(side: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (side, side, 3)).astype(np.uint8)


def with_noise(pixels: np.ndarray) -> np.ndarray:
    """Four times the noise of `blurred_and_noisy`."""
    noisy = pixels + np.random.default_rng(2).normal(0, 32, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def with_specks(pixels: np.ndarray) -> np.ndarray:
    """Six red specks in free places, each about 70 % of the smallest thing that counts."""
    side, marked = len(pixels), pixels.copy()
    speck = side // 22
    for x in (0.1, 0.5, 0.9):
        for y in (0.45, 0.55):
            top, left = int(y * side), int(x * side)
            marked[top : top + speck, left : left + speck] = COLOUR_VALUES["red"]
    return marked


@pytest.mark.parametrize("side", [112, 224])
def test_nothing_is_read_into_noise_or_emptiness(side: int) -> None:
    for picture in (draw(Scene((), "mint"), side), pure_noise(side)):
        seen = read_picture(picture)
        assert (seen.things, seen.word) == ((), None)


@pytest.mark.parametrize("side", [112, 224])
@pytest.mark.parametrize("disturbed", [with_noise, with_specks])
def test_a_picture_is_read_right_through_noise(
    side: int, disturbed: Callable[[np.ndarray], np.ndarray]
) -> None:
    verdict = judge(SCENE, disturbed(np.asarray(draw(SCENE, side))))
    assert [name for name, ok in verdict.items() if not ok] == []


@pytest.mark.parametrize("side", [112, 224])
def test_what_is_like_nothing_known_is_unknown(side: int) -> None:
    """A bar, an L, a square of a colour far from all names, a word the wrong way round."""
    pixels = np.asarray(draw(Scene((), "white"), side)).copy()
    fifth = side // 5
    first, last, thin = slice(fifth, 2 * fifth), slice(3 * fifth, 4 * fifth), fifth // 4
    pixels[fifth : fifth + thin, first] = COLOUR_VALUES["red"]
    pixels[last, fifth : fifth + thin] = pixels[4 * fifth - thin : 4 * fifth, first] = 40, 80, 225
    pixels[last, last] = 128, 255, 0
    looks = {thing.look for thing in read_picture(pixels).things}
    assert looks == {("red", UNKNOWN), ("blue", UNKNOWN), (UNKNOWN, "square")}
    printed = draw(Scene((), "white", "fox"), side)
    assert read_picture(printed).word == "fox"
    assert read_picture(ImageOps.mirror(printed)).word is None


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64, 3), dtype=np.float32), "uint8"),
        (np.zeros((64, 64), dtype=np.uint8), r"\[S, S, 3\]"),
        (np.zeros((64, 48, 3), dtype=np.uint8), "square"),
        (Image.new("RGB", (16, 16)), "at least 32"),
    ],
)
def test_other_pictures_are_refused(picture: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_picture(picture)  # type: ignore[arg-type]
