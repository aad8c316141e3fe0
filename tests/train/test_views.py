"""Batches of pictures and close-ups: what belongs together stays together."""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path

import pytest
import torch

from kelix_rt.processing import ImageProcessor, TextTokenizer
from kelix_rt.train.recipe import Sizes
from kelix_rt.train.text_tokenizer import write_text_tokenizer
from kelix_rt.train.views import Views
from kelix_rt.train.world import make_scene

SIDE = 224


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    folder: Path = tmp_path_factory.mktemp("text")
    write_text_tokenizer(folder, Sizes(), samples=20)
    text = TextTokenizer.from_pretrained(folder, vocab_size=Sizes().vocab)
    return Views(ImageProcessor.from_pretrained(folder), text)


def test_pictures_are_whole_and_read(views: Views) -> None:
    scenes = [make_scene("train", index) for index in range(3)]
    batch = views.pictures(scenes, SIDE, (2, True), random.Random(0))
    assert batch.patches.shape == (3 * 256, 3, 14, 14)
    assert batch.covered.shape == (3 * 256, 1, 14, 14)
    assert batch.grids.tolist() == [[1, 16, 16]] * 3 and batch.labels.shape == (3 * 64, 6)
    assert len(batch.readings) == 3 and all(any(r.counted) for r in batch.readings)


def test_close_ups_are_half_of_things_and_half_of_words(views: Views) -> None:
    scenes = (make_scene("train", index) for index in count())
    batch = views.close_ups(scenes, 8, SIDE, random.Random(0))
    sizes = [rows * columns // 4 for _, rows, columns in batch.grids.tolist()]
    assert len(sizes) == 8 and 4 * sum(sizes) == len(batch.patches) == len(batch.covered)
    assert batch.readings == ()
    parts = batch.labels.split(sizes)
    assert all((part[:, 0] > 0).any() for part in parts[:4])
    assert all((part[:, 3] > 0).any() for part in parts[4:])
    assert set(torch.unique(batch.covered).tolist()) == {-1.0, 1.0}
