from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kelix_rt.errors import InputError
from kelix_rt.train.checker import INK_CHROMA
from kelix_rt.train.world_draw import (
    COLOUR_VALUES,
    NEAREST_NAME,
    coverage,
    draw,
    shape_mask,
    unnamed_colour,
    word_font,
)
from kelix_rt.train.world_scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    UNNAMED,
    WORDS,
    Scene,
    Thing,
    plain,
)
from kelix_rt.train.world_splits import make_scene, make_scenes


def test_pictures_are_deterministic_and_vary() -> None:
    for scene in make_scenes("train", 30):
        picture = np.asarray(draw(scene))
        assert picture.shape == (112, 112, 3)
        assert np.array_equal(picture, np.asarray(draw(scene)))
        other = replace(scene, variation=scene.variation ^ 1)
        assert not np.array_equal(picture, np.asarray(draw(other)))


def test_two_sizes_show_the_same_picture() -> None:
    for scene in make_scenes("train", 40):
        large = draw(scene, 448).resize((112, 112), Image.Resampling.BOX)
        difference = np.abs(np.asarray(large, dtype=float) - np.asarray(draw(scene)))
        assert difference.mean() < 1.0


@pytest.mark.parametrize("side", [56, 112, 256])
def test_nothing_touches_the_frame(side: int) -> None:
    """The checker takes the background from there, and whole words stay readable."""
    for word in WORDS:
        for variation in range(4):
            scene = Scene((), "white", word, "top", variation)
            assert np.asarray(draw(scene, side)).min(axis=2)[frame(side)].min() > 200
    for shape in (*SHAPES, UNNAMED):
        for cell in ("top left", "bottom right"):
            thing = Thing(shape, "blue", "large", cell)
            for variation in range(16):
                picture = np.asarray(draw(Scene((thing,), "white", variation=variation), side))
                assert picture.min(axis=2)[frame(side)].min() > 200


def frame(side: int) -> np.ndarray:
    return np.pad(np.zeros((side - 4, side - 4), dtype=bool), 2, constant_values=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_antialiased_and_centred(shape: str) -> None:
    mask = np.asarray(shape_mask(shape, 40.0, 0.0, (0.0, 0.0)), dtype=float) / 255
    rows, columns = np.nonzero(mask > 0.5)
    centre = (mask.shape[0] - 1) / 2
    assert abs((rows.min() + rows.max()) / 2 - centre) <= 1
    assert abs((columns.min() + columns.max()) / 2 - centre) <= 1
    assert ((mask > 0.1) & (mask < 0.9)).any()
    assert (mask[0].max(), mask[:, 0].max(), mask[-1].max(), mask[:, -1].max()) == (0, 0, 0, 0)
    middle = mask[mask.shape[0] // 2, mask.shape[1] // 2]
    assert middle == (0 if shape == "ring" else 1)


def test_things_have_their_colour() -> None:
    for colour in COLOURS:
        picture = draw(Scene((Thing("circle", colour, "large", "center"),), "black"))
        middle = np.asarray(picture)[56, 56].astype(int)
        assert np.abs(middle - COLOUR_VALUES[colour]).max() <= 12


def test_unnamed_colours_are_none_of_the_named_ones() -> None:
    values = np.array(list(COLOUR_VALUES.values()))
    rng = random.Random(0)
    for _ in range(200):
        colour = np.array(unnamed_colour(rng))
        assert np.linalg.norm(values - colour, axis=1).min() > NEAREST_NAME - 1
        assert np.ptp(colour) >= INK_CHROMA, "a colour, no ink"


@pytest.mark.parametrize("look", [("ring", UNNAMED), (UNNAMED, "red")])
def test_variations_decide_what_the_unnamed_look_like(look: tuple[str, str]) -> None:
    thing = Thing(*look, "large", "center")
    for nuisances in (True, False):
        scenes = [Scene((thing,), "black", variation=i % 8, nuisances=nuisances) for i in range(16)]
        pictures = [draw(scene).tobytes() for scene in scenes]
        assert pictures[:8] == pictures[8:] and len(set(pictures)) > 3


def test_words_stand_out_on_every_background() -> None:
    for background in BACKGROUNDS:
        picture = np.asarray(draw(Scene((), background, "moon", "center")), dtype=int)
        assert np.ptp(picture.sum(axis=2)) > 3 * 90


def test_font_scales() -> None:
    assert word_font(40).getlength("moon") == pytest.approx(
        2 * word_font(20).getlength("moon"), rel=0.1
    )


def test_tiny_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="at least 32 pixels, got 31"):
        draw(Scene((), "white"), 31)


def test_drawing_is_fast() -> None:
    """Processor time, the best of three tries: a busy machine slows even that down."""
    scenes = list(make_scenes("train", 200))
    draw(scenes[0])
    tries = []
    for _ in range(3):
        start = time.process_time()
        for scene in scenes:
            draw(scene)
        tries.append((time.process_time() - start) / len(scenes))
    assert min(tries) < 0.004, tries  # measured 0.8 ms


def test_coverage_is_where_something_is_drawn() -> None:
    thing = Thing("square", "green", "large", "top left")
    scene = Scene((thing,), "mint", word="map", band="bottom", variation=3)
    covered = np.asarray(coverage(scene, draw(scene, 112))) > 0
    assert covered[29, 29] and not covered[:56, 70:].any()  # the thing's centre, the free corner
    assert covered[70:96].any() and not covered[105:].any()  # the word's band, the rim
    bare = Scene((), "mint", variation=3)
    assert not np.asarray(coverage(bare, draw(bare, 112))).any()


def test_plain_pictures_differ_by_what_texts_can_name() -> None:
    scenes = [make_scene("train", 3), replace(make_scene("train", 3), variation=7)]
    varied, other = (np.asarray(draw(scene, 112)) for scene in scenes)
    one, two = (np.asarray(draw(plain(scene), 112)) for scene in scenes)
    assert np.array_equal(one, two) and not np.array_equal(varied, other)
    thing = Thing("square", "red", "large", "center")
    picture = draw(Scene((thing,), "white", nuisances=False), 112)
    assert picture.getpixel((56, 56)) == COLOUR_VALUES["red"]
    mask = np.asarray(coverage(Scene((thing,), "white", nuisances=False), picture)) > 0
    assert np.array_equal(mask, mask[::-1]) and np.array_equal(mask, mask[:, ::-1])


def test_a_thing_of_a_plain_picture_covers_its_tokens_alike_in_every_cell() -> None:
    quarters = []
    for cell, (left, top) in {
        "top left": (0, 0),
        "center": (56, 56),
        "top right": (112, 0),
    }.items():
        picture = draw(Scene((Thing("star", "blue", "large", cell),), "tan", nuisances=False), 224)
        quarters.append(np.asarray(picture)[top : top + 112, left : left + 112])
    assert np.array_equal(quarters[0], quarters[1]) and np.array_equal(quarters[0], quarters[2])
