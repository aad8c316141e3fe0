"""Every question is answered a second time, from its text and the scene alone."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from kelix_rt.train.pictures import strange_twin
from kelix_rt.train.world_questions import QUESTION_KINDS, questions
from kelix_rt.train.world_scene import COLOURS, ODD, SHAPES, UNNAMED, Scene, Thing, unnamed
from kelix_rt.train.world_splits import (
    SPLITS,
    Split,
    count_combination,
    look_combination,
    make_scenes,
    split_of_combination,
)
from kelix_rt.train.world_text import NUMBERS, RELATION_PHRASES, Question, a

NOUN = (
    rf"(?:(?:{'|'.join(COLOURS)}) (?:objects?|(?:{'|'.join(SHAPES)})(?:e?s)?)"
    rf"|objects?|(?:{'|'.join(SHAPES)})(?:e?s)?)"
)
PHRASES = {phrase: name for name, phrases in RELATION_PHRASES.items() for phrase in phrases}


def named(noun: str, scene: Scene) -> list[Thing]:
    """The things a noun names."""
    *colour, shape = noun.split()
    found = [t for t in scene.things if not colour or t.colour == colour[0]]
    if shape.startswith("object"):
        return found
    return [t for t in found if shape in (t.shape, f"{t.shape}s", f"{t.shape}es")]


def the(noun: str, scene: Scene) -> Thing:
    things = named(noun, scene)
    assert len(things) == 1, (noun, scene)
    return things[0]


def related(first: Thing, second: Thing, scene: Scene) -> str:
    for x, relation, y in scene.relations():
        if (x, y) == (first, second):
            return relation
        if (y, x) == (first, second):
            return {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
    raise AssertionError((first, second))


def only(answers: list[str]) -> str:
    assert len(set(answers)) == 1, answers
    return answers[0]


def solve(question: Question, scene: Scene) -> str:
    nouns = re.findall(rf"\b(?:the|many) ({NOUN})\b", question.text)
    if question.kind in ("colour", "shape", "size"):
        return only([getattr(thing, question.kind) for thing in named(nouns[0], scene)])
    if question.kind == "relation":
        return solve_relation(question.text, nouns, scene)
    return {
        "count": lambda: NUMBERS[len(named(nouns[0], scene))],
        "location": lambda: the(nouns[0], scene).cell,
        "word": lambda: scene.word,
        "background": lambda: scene.background,
        "yesno": lambda: "yes" if holds(question.text, scene) else "no",
    }[question.kind]()


def solve_relation(text: str, nouns: list[str], scene: Scene) -> str:
    if len(nouns) == 2:
        if text.startswith("seen from"):
            nouns = nouns[::-1]
        first, second = (the(noun, scene) for noun in nouns)
        places = f"the {nouns[0]} is in the {first.cell} and the {nouns[1]} in the {second.cell}"
        return f"{places}: {related(first, second, scene)}"
    match = re.search(rf"({'|'.join(sorted(PHRASES, key=len, reverse=True))}) the", text)
    assert match and len(scene.things) == 2
    known = the(nouns[0], scene)
    other = next(thing for thing in scene.things if thing != known)
    assert related(other, known, scene) == PHRASES[match.group(1)]
    return a(" ".join(other.look).replace(f" {UNNAMED}", " object").removeprefix(f"{UNNAMED} "))


def holds(text: str, scene: Scene) -> bool:
    if match := re.fullmatch(r"is the background (\w+)\?", text):
        return match.group(1) == scene.background
    if match := re.fullmatch(r"(?:is the word|does the text say) (\w+)\?", text):
        return match.group(1) == scene.word
    numbers = "|".join(NUMBERS)
    if match := re.fullmatch(rf"(?:is|are) there ({numbers}) ({NOUN})\?", text):
        return len(named(match.group(2), scene)) == NUMBERS.index(match.group(1))
    if match := re.search(rf"(?:is there|do you see|show) an? ({NOUN})\?$", text):
        return bool(named(match.group(1), scene))
    if match := re.fullmatch(rf"is the (\w+) ({'|'.join(COLOURS)})\?", text):
        return the(match.group(1), scene).colour == match.group(2)
    match = re.fullmatch(rf"is the ({NOUN}) ([\w ]+) the ({NOUN})\?", text)
    assert match, text
    first, second = the(match.group(1), scene), the(match.group(3), scene)
    return related(first, second, scene) == PHRASES[match.group(2)]


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_the_scene(split: Split) -> None:
    rng = random.Random(11)
    kinds: Counter = Counter()
    answers: Counter = Counter()
    for scene in make_scenes(split, 600):
        for question in questions(scene, rng):
            assert solve(question, scene) == question.answer, (question, scene)
            assert question.text == question.text.lower() and question.text[-1] in ".?"
            kinds[question.kind] += 1
            answers[question.kind, question.answer] += 1
    assert set(kinds) == set(QUESTION_KINDS) and min(kinds.values()) > 60
    assert 0.4 < answers["yesno", "yes"] / kinds["yesno"] < 0.6
    assert min(answers["count", n] for n in NUMBERS[1:5]) > 30


def test_strange_things_are_asked_about_by_what_has_a_name() -> None:
    rng = random.Random(14)
    asked: Counter = Counter()
    for scene in map(strange_twin, make_scenes("train", 900)):
        for question in questions(scene, rng):
            assert solve(question, unnamed(scene)) == question.answer, (question, scene)
            assert not any(name in f"{question.text} {question.answer}" for name in ODD)
            asked[question.kind] += 1
    assert min(asked[kind] for kind in ("colour", "shape", "count", "relation", "location")) > 60


def test_train_questions_never_name_held_out_combinations() -> None:
    rng = random.Random(12)
    scenes = list(make_scenes("train", 1500))
    for scene in (*scenes, *map(strange_twin, scenes[:500])):
        for question in questions(scene, rng):
            text = f"{question.text} {question.answer}"
            for colour, shape in re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text):
                assert split_of_combination(look_combination(colour, shape)) == "train", text
            match = re.match(rf"is the ({'|'.join(SHAPES)}) ({'|'.join(COLOURS)})\?", text)
            if match:
                look = look_combination(match.group(2), match.group(1))
                assert split_of_combination(look) == "train", text
            match = re.search(rf"(two|three|four) (?:\w+ )?({'|'.join(SHAPES)})(?:e?s)\b", text)
            if match:
                count = count_combination(NUMBERS.index(match.group(1)), match.group(2))
                assert split_of_combination(count) == "train", text


def test_test_questions_do_name_them_both_ways() -> None:
    """A held-out look is asked about with either answer, so that "no" is not a safe guess."""
    rng, answers = random.Random(13), Counter()
    for scene in make_scenes("test", 1500):
        for question in questions(scene, rng):
            match = re.search(rf" an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\?", question.text)
            if question.kind == "yesno" and match:
                split = split_of_combination(look_combination(*match.groups()))
                answers[split, question.answer] += 1
    assert answers["test", "yes"] > 30 and answers["test", "no"] > 30
