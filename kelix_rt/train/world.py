"""The synthetic world kelix-tiny learns: scenes, pictures, and texts about them.

    sample = make_sample("test", index=3)
    picture = draw(sample.scene, 256)
    sample.prompt.text, sample.questions, judge(sample.scene, picture)

Everything is a function of (split, index, seed); `WORLD_VERSION` names the function.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from kelix_rt.train.pure_text import text_sample
from kelix_rt.train.world_draw import draw
from kelix_rt.train.world_questions import QUESTION_KINDS, questions
from kelix_rt.train.world_scene import WORLD_VERSION, Scene, Thing, odd, require_world
from kelix_rt.train.world_splits import Kind, Split, make_scene, make_scenes, split_of
from kelix_rt.train.world_text import Prompt, Question, caption, caption_question, prompt

__all__ = [
    "QUESTION_KINDS",
    "WORLD_VERSION",
    "Kind",
    "Prompt",
    "Question",
    "Sample",
    "Scene",
    "Split",
    "Thing",
    "corpus",
    "draw",
    "make_sample",
    "make_scene",
    "make_scenes",
    "make_text",
    "require_world",
    "split_of",
]


@dataclass(frozen=True)
class Sample:
    """A scene with one wording of everything that is said about it.

    caption answers caption_question; prompt asks for the picture; questions: one of every kind.
    """

    scene: Scene
    caption: str
    caption_question: str
    prompt: Prompt
    questions: tuple[Question, ...]


def make_sample(split: Split, index: int, seed: int = 0, kind: Kind | None = None) -> Sample:
    """Sample number `index` of a split; its scene is `make_scene` of the same arguments."""
    scene = make_scene(split, index, seed, kind)
    rng = _rng("texts", seed, split, index, kind)
    return Sample(
        scene,
        caption(scene, rng),
        caption_question(rng),
        prompt(scene, rng),
        tuple(questions(scene, rng)),
    )


def make_text(split: Split, index: int, seed: int = 0) -> Question:
    """Pure-text sample number `index`; the splits share their questions, not their order."""
    return text_sample(_rng("text", seed, split, index))


def corpus(samples: int | None = None, seed: int = 0) -> Iterator[str]:
    """Every text of the first train samples (None: without end), and requests for their odd twins,
    to train a tokenizer on."""
    for index in count() if samples is None else range(samples):
        sample = make_sample("train", index, seed)
        text = make_text("train", index, seed)
        rng = _rng("odd", index, seed)
        odd_request = prompt(odd(sample.scene, rng), rng).text
        yield from (sample.caption, sample.caption_question, sample.prompt.text, odd_request)
        for question in (*sample.questions, text):
            yield question.text
            yield question.answer


def _rng(*names: object) -> random.Random:
    return random.Random(f"kelix world {WORLD_VERSION} {names}")
