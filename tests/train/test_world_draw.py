from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kelix_rt.errors import InputError
from kelix_rt.train.checker import INK_CHROMA
from kelix_rt.train.world_draw import (
    BLENDED,
    COLOUR_VALUES,
    colour_value,
    coverage,
    draw,
    shape_mask,
    word_font,
)
from kelix_rt.train.world_scene import (
    BACKGROUNDS,
    BLENDS,
    COLOURS,
    ODD_SHAPES,
    SHAPES,
    UNNAMED,
    WORDS,
    Scene,
    Thing,
    plain,
)
from kelix_rt.train.world_splits import make_scene, make_scenes

NEAREST = 36.0  # RGB distance that a blend keeps from every named colour


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
        assert difference.mean() < 2.0  # a word's letters lie a little otherwise: 1.6 at most


@pytest.mark.parametrize("side", [56, 112, 256])
def test_nothing_touches_the_frame(side: int) -> None:
    """The checker takes the background from there, and whole words stay readable."""
    for word in WORDS:
        for variation in range(4):
            scene = Scene((), "white", word, "top", variation)
            assert np.asarray(draw(scene, side)).min(axis=2)[frame(side)].min() > 200
    for shape in (*SHAPES, *ODD_SHAPES):
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


def test_blends_are_none_of_the_named_colours() -> None:
    values = np.array([COLOUR_VALUES[name] for name in COLOURS])
    near = []
    for first, second in itertools.permutations(COLOURS, 2):
        apart = (COLOURS.index(first) - COLOURS.index(second)) % len(COLOURS)
        if apart not in (1, 2, 6, 7):
            continue
        mixed = (1 - BLENDED) * values[COLOURS.index(first)] + BLENDED * values[
            COLOURS.index(second)
        ]
        nearest = np.linalg.norm(values - mixed, axis=1).min()
        if nearest < NEAREST:
            near.append(f"{first} {second}")
            continue
        found = np.array(colour_value(f"{first} {second}"))
        assert np.abs(found - mixed).max() <= 0.5
        assert np.ptp(found) >= INK_CHROMA, "a colour, no ink"
    assert len(near) + len(BLENDS) == 32 and not set(near) & set(BLENDS)


def test_what_is_unnamed_is_not_drawn() -> None:
    for look in (("ring", UNNAMED), (UNNAMED, "red")):
        with pytest.raises(InputError, match="must have a name"):
            draw(Scene((Thing(*look, "large", "center"),), "black"))


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
