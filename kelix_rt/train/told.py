"""Scenes told in words alone, with questions: what a language model brings along."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kelix_rt.train.asked import of_kind, some
from kelix_rt.train.world_scene import SHAPES, Scene
from kelix_rt.train.world_text import Question, inventory, plural

if TYPE_CHECKING:
    from kelix_rt.train.chats import ChatBuilder, Document, Task
    from kelix_rt.train.pictures import Subject

# What shapes are called here besides their names: single tokens that no picture shows, and that
# stand nowhere else in what is told or asked.
NAMES = (
    "letter", "corner", "opposite", "assistant", "kelix", "plus", "minus",
    "five", "six", "seven", "eight", "nine",
)  # fmt: skip


def told(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """A scene with questions of all kinds, a line each."""
    return _lines(chats, subject.scene, some(subject.scene, rng, 12), rng)


def told_of(kind: str) -> Task:
    """`told` with questions of one kind, where the scene has any."""

    def document(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
        return _lines(chats, subject.scene, of_kind(kind, subject.scene, rng, 8), rng)

    return document


def _lines(
    chats: ChatBuilder, scene: Scene, asked: Sequence[Question], rng: random.Random
) -> Document:
    """Half of the shapes go by other names: "a small red letter". A name then has any colour, which
    cannot be known by heart and has to be looked up in what was told."""
    named = zip(SHAPES, rng.sample(NAMES, len(SHAPES)), strict=True)
    names = {shape: other for shape, other in named if rng.random() < 0.5}
    asked = [
        replace(question, text=_renamed(question.text, names),
                answer=_renamed(question.answer, names))
        for question in asked
    ]  # fmt: skip
    return chats.lines(_renamed(inventory(scene), names), asked)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for shape, name in names.items():
        text = text.replace(plural(shape), plural(name)).replace(shape, name)
    return text
