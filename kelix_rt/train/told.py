"""Scenes told in words alone, with questions: what a language model brings along."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kelix_rt.train.asked import of_kind, some
from kelix_rt.train.world_scene import SHAPES, WORDS, Scene
from kelix_rt.train.world_text import Question, inventory, plural

if TYPE_CHECKING:
    from kelix_rt.train.chats import ChatBuilder, Document
    from kelix_rt.train.pictures import Subject


def told(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """Questions of all kinds."""
    return _lines(chats, subject.scene, some(subject.scene, rng, 12), rng)


def told_colours(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The colours of all there is."""
    return _lines(chats, subject.scene, of_kind("colour", subject.scene, rng, 8), rng)


def told_places(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The places of all there is."""
    return _lines(chats, subject.scene, of_kind("location", subject.scene, rng, 8), rng)


def told_relations(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """What is learned last: how things lie to each other, where they do."""
    return _lines(chats, subject.scene, of_kind("relation", subject.scene, rng, 8), rng)


def _lines(
    chats: ChatBuilder, scene: Scene, asked: Sequence[Question], rng: random.Random
) -> Document:
    """Half of the shapes go by the names of other things: "a small red boat". Pairs of colours and
    names are then too many to know by heart, and have to be looked up in what was told."""
    others = rng.sample([word for word in WORDS if word != scene.word], len(SHAPES))
    named = zip(SHAPES, others, strict=True)
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
