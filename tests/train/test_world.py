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
from kelix_rt.train.world_scene import UNNAMED, WORDS, Scene, Thing, plain
from kelix_rt.train.world_splits import SPLITS

# Scenes and texts of world 1. When this changes, WORLD_VERSION must change with it: a checkpoint
# trained before would be tested on scenes it may have seen.
DIGEST = "bf90c45e9343a884"

# Pictures of world 1: `looked_at` of each of `shown_scenes`, two scenes a line.
PICTURES = bytes.fromhex(
    """
    93938d91918b2f59ddb9859b90908a92928c8e8f8a f78abdee78bdf37daef77fbab6dcccc6c5c8c0cdc7
    c8ba2f1e6f821d1c461a19431a18421b1a401b1a44 8d84888d84887c747a766f768e84888d8488605b64
    bfdbcbe0a451aec8ba9eb5a8c0dbcbbfdbcb8ea499 182547cf75261320421320421622441b2647132042
    75cc8f75c487bce6c7bce6c7bee8c8a0daafbce6c7 12121e10101cb8651c7c491910101c11111d10101c
    e8545df8f4f1d9232af6f2eff6f2eef6f2eff3e5e2 c3dec7bfdac35885dc8babc9c0dcc4c1dcc5c0dbc4
    edf7f0d8322be2322fdb2f2feef8f1eff9f2edebe4 696c6e818587868a8c8a8e908285876d6f71888c8e
    24a7bb5f2b7c642c881b1215180e1217161a191013 21af453ec4c7caba94c8b892c8b892c7b892c9b993
    308b3f286c401417412f843e161a44181b45151842 8c8c8c8c8c8c2850e1b8889e8c8c8c8c8c8c8a8b8e
    8c8c8c8c8c8c7d7d7d7979798c8c8c8c8c8c686868 7ac68d7ac68dbce2cabce2cabce2cab6e0c5bce2ca
    bce2cabce2ca4e75db80a7d3bce2cabce2cabce2ca 28a6ae68278a68278a161616161616161717161616
    1d1c4e1e1d4f2121522423534d4e741e1d4f262555 1b141a1c151b20191f221b214c474b1c151b241d23
    c1e0cec2e1cfbddccabddbc99bb4a5c2e1cfbad8c6 8d888f8b868d908b928e899067a5b48c878e8f8a91
    3359e22c53e1b451b3f68858f6f6f6f6f6f6f6f6f6 5e7be6728ce9a8962df68764f6f6f6edeff5f6f6f6
    3359e23359e2e54e24a0d778f6f6f6f6f6f6f6f6f6 5e7be6728ce978d399e9526cf6f6f6edeff5f6f6f6
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
    assert (WORLD_VERSION, digest.hexdigest()[:16]) == (1, DIGEST)


def shown_scenes() -> list[Scene]:
    """Some of every split and without nuisances, both inks, and what variations decide."""
    scenes = [make_scene(split, index) for split in SPLITS for index in range(5)]
    scenes += [plain(scene) for scene in scenes[::3]]
    scenes += [Scene((), ground, "moon", "center") for ground in ("navy", "black", "mint")]
    scenes.append(Scene((Thing("ring", "cyan", "small", "center"),), "gray", variation=5))
    unnamed = (
        *(Thing(UNNAMED, "blue", "large", cell) for cell in ("top left", "top right")),
        *(Thing("square", UNNAMED, "large", cell) for cell in ("bottom left", "bottom right")),
    )
    return scenes + [Scene(unnamed, "white", variation=i, nuisances=False) for i in range(4)]


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
    assert WORLD_VERSION == 1 and stored.shape == found.shape
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
