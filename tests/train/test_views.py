"""Batches of pictures and close-ups: what belongs together stays together."""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path

import pytest
import torch

from kelix_rt.processing import ImageProcessor, TextTokenizer
from kelix_rt.train import views as module
from kelix_rt.train.pictures import strange_twin
from kelix_rt.train.recipe import Sizes
from kelix_rt.train.text_tokenizer import write_text_tokenizer
from kelix_rt.train.token_labels import IGNORED
from kelix_rt.train.views import ALIKE, PictureBatch, Views
from kelix_rt.train.world import draw, make_scene
from kelix_rt.train.world_scene import plain
from kelix_rt.train.world_splits import make_scenes, split_of

SIDE = 224


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    folder: Path = tmp_path_factory.mktemp("text")
    write_text_tokenizer(folder, Sizes(), samples=20)
    text = TextTokenizer.from_pretrained(folder, vocab_size=Sizes().vocab)
    return Views(ImageProcessor.from_pretrained(folder), text)


def test_pictures_are_whole_and_read(views: Views) -> None:
    scenes = [make_scene("train", index) for index in range(3)]
    batch = views.pictures(scenes, [], SIDE, (2, True), random.Random(0))
    assert batch.patches.shape == (3 * 256, 3, 14, 14)
    assert batch.covered.shape == (3 * 256, 1, 14, 14)
    assert batch.grids.tolist() == [[1, 16, 16]] * 3 and batch.labels.shape == (3 * 64, 6)
    assert len(batch.readings) == 3 and all(any(r.counted) for r in batch.readings)


def test_strange_pictures_are_shown_but_not_read(views: Views) -> None:
    scenes = [make_scene("train", index, kind="mixed") for index in range(3)]
    strangers = [strange_twin(scenes[2])]
    batch = views.pictures(scenes[:2], strangers, SIDE, (2, True), random.Random(0))
    assert len(batch.grids) == 3 and len(batch.readings) == 2
    shown = views._images.patchify(draw(strangers[0], SIDE))[0]
    assert torch.equal(batch.patches[2 * 256 :], shown)
    labels = batch.labels.view(3, 64, 6)
    assert (labels[2] == IGNORED).any() and not (labels[:2] == IGNORED).any()


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


def token_pixels(batch: PictureBatch) -> torch.Tensor:
    pictures = batch.patches.view(-1, 8, 2, 8, 2, 3 * 14 * 14)
    return pictures.transpose(2, 3).reshape(-1, 4 * 3 * 14 * 14)


def test_twins_have_the_same_pixels_wherever_they_lie(views: Views) -> None:
    scenes = [make_scene("train", index, kind="mixed") for index in range(5)]
    strangers = [strange_twin(scenes.pop())]
    batch = views.pictures(scenes, strangers, SIDE, (2, True), random.Random(0), twins=True)
    assert len(batch.readings) == 4 and len(batch.grids) == 7
    pixels = token_pixels(batch)
    one, other = batch.twins.unbind(1)
    assert torch.equal(pixels[one], pixels[other]) and (one != other).all()
    assert torch.bincount(one).max() == torch.bincount(other).max() == 1
    shaped = batch.labels[one, 0] > 0
    assert shaped.any() and not shaped.all()
    assert (one % 64 != other % 64)[shaped].any(), "a thing at another place"
    kinds = torch.unique(pixels[one], dim=0, return_counts=True)[1]
    assert kinds.min() >= 2 and kinds.max() == ALIKE


def test_half_of_the_pictures_with_twins_are_plain(views: Views) -> None:
    scenes = [make_scene("train", index) for index in range(4)]
    batch = views.pictures(scenes, [], SIDE, (2, True), random.Random(0), twins=True)
    shown = [*map(plain, scenes[:2]), *scenes[2:]]
    patches = [views._images.patchify(draw(scene, SIDE))[0] for scene in shown]
    assert torch.equal(batch.patches[: 4 * 256], torch.cat(patches))


def test_no_twins_without_a_second_picture(views: Views) -> None:
    batch = views.pictures([make_scene("train", 0)], [], SIDE, (1, False), random.Random(0))
    assert batch.twins.shape == (0, 2)


def test_moved_things_stay_in_their_split() -> None:
    scenes = list(make_scenes("train", 200, kind="mixed"))
    moved = [module._moved(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    assert {split_of(scene) for scene in moved} == {"train"}
    anywhere = [module._any_moved(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    assert {split_of(scene) for scene in anywhere} > {"train"}
