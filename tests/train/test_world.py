from __future__ import annotations

import hashlib
import re
from itertools import islice

from kelix_rt.train.world import (
    WORLD_VERSION,
    corpus,
    make_sample,
    make_scene,
    make_text,
)
from kelix_rt.train.world_scene import WORDS
from kelix_rt.train.world_splits import SPLITS

# Scenes and texts of world 1. When this changes, WORLD_VERSION must change with it: a checkpoint
# trained before would be tested on scenes it may have seen.
DIGEST = "bf90c45e9343a884"


def test_version_names_the_world() -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(40):
            sample = make_sample(split, index)
            states = sorted(sample.prompt.states)
            shown = (sample.scene, sample.caption, sample.prompt.text, states, sample.questions)
            digest.update(repr((shown, make_text(split, index))).encode())
    assert (WORLD_VERSION, digest.hexdigest()[:16]) == (1, DIGEST)


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
