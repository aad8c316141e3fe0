"""Scenes in words: shapes under other names, and one kind of question at a time."""

from __future__ import annotations

import random
import re

import pytest

from kelix_rt.train.chats import TASKS
from kelix_rt.train.pictures import Subject
from kelix_rt.train.told import NAMES
from kelix_rt.train.world import make_scene
from kelix_rt.train.world_questions import QUESTION_KINDS, questions
from kelix_rt.train.world_scene import SHAPES, WORDS, Scene, Thing
from kelix_rt.train.world_text import Question, inventory, plural


class Told:
    """In the place of a ChatBuilder: what it is asked to write."""

    def lines(self, told: str, asked: list[Question]) -> tuple[str, list[Question]]:
        return told, asked


def told(task: str, seed: int) -> tuple[Scene, str, list[Question]]:
    scene = make_scene("train", seed)
    subject = Subject(scene, lambda: pytest.fail("no picture is asked for"), seed)
    text, asked = TASKS[task](Told(), subject, random.Random(seed))  # type: ignore
    return scene, text, asked


def test_names_stand_nowhere_else() -> None:
    texts = []
    for seed in range(200):
        scene = make_scene("train", seed)
        asked = questions(scene, random.Random(seed))
        texts += [inventory(scene), *(f"{question.text} {question.answer}" for question in asked)]
    words = set(re.findall("[a-z]+", " ".join(texts)))
    assert "circle" in words and "circles" in words
    assert not words & {*NAMES, *map(plural, NAMES)} and not set(NAMES) & set(WORDS)


def test_a_shape_has_one_name_in_all_that_is_said() -> None:
    thing = Thing("star", "red", "small", "top left")
    scene = Scene((thing, Thing("ring", "blue", "small", "top right")), "navy")
    seen = set()
    for seed in range(40):
        subject = Subject(scene, lambda: pytest.fail("no picture is asked for"), 0)
        text, asked = TASKS["told relations"](Told(), subject, random.Random(seed))  # type: ignore
        names = re.findall(r"a small (?:red|blue) ([a-z]+) in", text)
        assert len(set(names)) == 2 and asked
        for question in asked:
            assert set(re.findall("[a-z]+", question.text)) & {*SHAPES, *NAMES} <= set(names)
        seen |= set(names)
    assert {"star", "ring"} < seen <= {"star", "ring", *NAMES}


@pytest.mark.parametrize("task", ["told", "told colours", "told places", "told relations"])
def test_half_of_the_shapes_that_are_told_have_other_names(task: str) -> None:
    kept, renamed = 0, 0
    for seed in range(100):
        scene, text, asked = told(task, seed)
        texts = [text, *(f"{question.text} {question.answer}" for question in asked)]
        for shape in {thing.shape for thing in scene.things}:
            kept += shape in text
            renamed += shape not in text
            assert shape in text or not any(shape in other for other in texts)
        for thing in scene.things:
            assert f"{thing.size} {thing.colour} " in text and thing.cell in text
    assert 0.4 < renamed / (kept + renamed) < 0.6


@pytest.mark.parametrize(
    ("task", "kind"),
    [("told colours", "colour"), ("told places", "location"), ("told relations", "relation")],
)
def test_one_kind_of_question_is_asked_where_there_is_one(task: str, kind: str) -> None:
    found = 0
    for seed in range(60):
        scene, _, asked = told(task, seed)
        kinds = {question.kind for question in asked}
        assert kinds <= set(QUESTION_KINDS) and len(set(asked)) == len(asked) <= 8
        if any(question.kind == kind for question in questions(scene, random.Random(0))):
            assert kinds == {kind}
            found += 1
    assert found > 10
