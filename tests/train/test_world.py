from __future__ import annotations

import hashlib
import re
from itertools import islice

import numpy as np

from kelix_rt.train.world import (
    WORLD_VERSION,
    corpus,
    draw,
    make_sample,
    make_scene,
    make_text,
)
from kelix_rt.train.world_draw import BAND_HEIGHTS, CELL_CENTRES
from kelix_rt.train.world_scene import BLENDS, CELLS, ODD_SHAPES, SHAPES, WORDS, Scene, Thing, plain
from kelix_rt.train.world_splits import SPLITS

# Scenes and texts of world 2. When this changes, WORLD_VERSION must change with it: a checkpoint
# trained before would be tested on scenes it may have seen.
DIGEST = "db9fc5516d0f5768"

# Pictures of world 2: `looked_at` of each of `shown_scenes`, two scenes a line.
PICTURES = bytes.fromhex(
    """
    dbc877ccba967f33afccba96ccba96ccba96c3ac98 5d6ab45a72b432ad4f85868d888890898a9181898a
    66b2b5b791618e8e8e8d8d8d9090909092928e8e8e fcf6f8fcf6f8d8d3d5e6e1e3fcf6f8fcf6f8b2adb0
    1d174cad62901f194e201a4f1e184e1e184d1f194e d1ba8cd1ba8ce7d05dd2bb8dd2bb8dd1ba8cd2bb8d
    595a774d4e6e1a1c48ef852822244e494a6b252146 fc961bd0bb97e59ca7cdb894ceba96d4b88dcdb894
    a3cfb49347beb2d5bee8959af0f0f6eeeef4f1f1f7 cdb48dd0b790e3c661ceb58eceb48eceb58ecdb48d
    87878e83838ac34543b0885986868e85858c96887e b6ddcab7decbb6ddca7b98d4b7decbb6ddcab7decb
    f3b055b581c8fcb154f1e79ef6f8f4f6f9f4f5f7f2 e2929dfaee8ebdbec3c4c6caf2fafcf3fafcb4b4b9
    adaeacb7b8b7f7f9fabf9dd8f6f8f8acadace6ddef ddc86ccdb994822dafcdb994cdb994cdb994cdb994
    f6f6f6f6f6f6ccccccdcdcdcf6f6f6f6f6f6bebebe 5c607f595d7d181e4af58c1e181e4a6165831c2049
    cdb994cdb994dfca67cdb994cdb994cdb994ceba92 f5a34c9853bcf5a857f6eb9bf6f6f6f6f5f5f6f5f5
    1d1c4e1e1d4f2121522423534d4e741e1d4f262555 1b141a1c151b20191f221b214c474b1c151b241d23
    c1e0cec2e1cfbddccabddbc99bb4a5c2e1cfbad8c6 8d888f8b868d908b928e899067a5b48c878e8f8a91
    e65125ee8a59bbb06584a040f6f6f6f6f1f0f6f6f6 c2d87eabd283adda807dd495f6f6f6f3f4f0f4f5f4
    2db58053c8ae3e8e8f6095b9f6f6f6f6f6f6f5f5f6 55aee198c1eb508dc78791cdf6f6f6ecf1f5f1f3f5
    7a73d8613fc4a799dec8a9dcf6f6f6f6f6f6f2f1f5 b558b7c960b5a62b79c85e85f6f6f6f5f3f5f6f6f6
    ee6c8aea7082f79d95f6c3aff6f6f6f6f5f5f6f1ef
    """
)
LEVELS = 2.0  # edges that all move by an eighth of a pixel change a mean by 1.2 at most


def test_version_names_the_world() -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(40):
            sample = make_sample(split, index)
            states = sorted(sample.prompt.states)
            shown = (sample.scene, sample.caption, sample.prompt.text, states, sample.questions)
            digest.update(repr((shown, make_text(split, index))).encode())
    assert (WORLD_VERSION, digest.hexdigest()[:16]) == (2, DIGEST)


def shown_scenes() -> list[Scene]:
    """Some of every split and without nuisances, both inks, and every odd shape and blend."""
    scenes = [make_scene(split, index) for split in SPLITS for index in range(5)]
    scenes += [plain(scene) for scene in scenes[::3]]
    scenes += [Scene((), ground, "moon", "center") for ground in ("navy", "black", "mint")]
    scenes.append(Scene((Thing("ring", "cyan", "small", "center"),), "gray", variation=5))
    shapes = (*ODD_SHAPES, *SHAPES)
    odd = [
        Thing(shapes[i % len(shapes)], colour, "large", CELLS[i % 4])
        for i, colour in enumerate(BLENDS)
    ]
    return scenes + [
        Scene(tuple(odd[i : i + 4]), "white", nuisances=False) for i in range(0, len(odd), 4)
    ]


def looked_at(scene: Scene) -> np.ndarray:
    """Mean colours [7, 3] of squares around the cells' centres and the middles of the bands."""
    side, half = 448, 45
    pixels = np.asarray(draw(scene, side), dtype=float)
    places = dict.fromkeys((*CELL_CENTRES.values(), *((0.5, y) for y in BAND_HEIGHTS.values())))
    squares = []
    for x, y in places:
        column, row = round(x * side), round(y * side)
        square = pixels[row - half : row + half, column - half : column + half]
        squares.append(square.mean(axis=(0, 1)))
    return np.array(squares)


def test_version_names_the_pictures() -> None:
    """Coarse, because versions of Pillow and FreeType may differ in the pixels of an edge: means
    over a fifth of the side, of large pictures, where an edge counts little. A colour that moves by
    three levels shows, a diameter by 2.5 %, or random numbers in another order; a lean of two more
    degrees or softer edges do not. That smaller pictures show the same, test_world_draw says."""
    found = np.array([looked_at(scene) for scene in shown_scenes()])
    stored = np.frombuffer(PICTURES, dtype=np.uint8).reshape(-1, *found.shape[1:])
    assert WORLD_VERSION == 2 and stored.shape == found.shape
    assert np.abs(found - stored).max() <= LEVELS, "other pictures need another WORLD_VERSION"


def test_sample_shows_its_scene() -> None:
    sample = make_sample("val", 3, seed=2, kind="word")
    assert sample == make_sample("val", 3, seed=2, kind="word")
    assert sample.scene == make_scene("val", 3, seed=2, kind="word")
    assert sample != make_sample("val", 3, seed=3, kind="word")
    assert {question.kind for question in sample.questions} >= {"word", "background"}


def test_corpus_suits_a_small_tokenizer() -> None:
    texts = list(corpus(1500))
    vocabulary = {word for text in texts for word in re.findall(r"[a-z]+|[^a-z ]", text)}
    assert set(WORDS) <= vocabulary
    assert set("abcdefghijklmnoprstuwxyz") <= vocabulary  # spelled words: single letters
    assert len(vocabulary) < 300
    assert all(text and text == text.lower() and text.isascii() for text in texts)
    assert list(corpus(20)) == list(islice(corpus(), len(list(corpus(20)))))
