"""Captions and prompts are read back and must agree with the scene."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from kelix_rt.train.pictures import odd_twin, strange_twin
from kelix_rt.train.world_scene import COLOURS, SHAPES, UNNAMED, Scene, Thing, unnamed
from kelix_rt.train.world_splits import SPLITS, make_scenes
from kelix_rt.train.world_text import (
    NUMBERS,
    RELATION_PHRASES,
    a,
    caption,
    caption_question,
    conclusion,
    counted,
    full_request,
    inventory,
    listed,
    plural,
    prompt,
)

GROUP = re.compile(
    rf"\b(an?|{'|'.join(NUMBERS)}) (?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    r"(?:e?s)?\b"
)


def told_things(text: str) -> Counter:
    told: Counter = Counter()
    for number, size, colour, shape in GROUP.findall(text):
        count = 1 if number in ("a", "an") else NUMBERS.index(number)
        told[colour, shape] += count
        assert size in ("", "small", "large")
    return told


def sizes_told(text: str, scene: Scene) -> bool:
    sizes = {thing.look: thing.size for thing in scene.things}
    found = GROUP.findall(text)
    assert all(size in ("", sizes[colour, shape]) for _, size, colour, shape in found)
    return bool(found) and all(size for _, size, _, _ in found)


def relation_told(text: str) -> tuple | None:
    for name, phrases in RELATION_PHRASES.items():
        for phrase in sorted(phrases, key=len, reverse=True):
            if f" {phrase} a" in text:
                before, after = text.split(f" {phrase} a", 1)
                return GROUP.findall(before)[-1][2:], name, GROUP.findall(f"a{after}")[0][2:]
    return None


def check(text: str, scene: Scene) -> None:
    assert text == text.lower() and text[-1] in ".?" and "  " not in text and "{" not in text
    assert len(text.split()) <= 32
    assert told_things(text) == Counter(thing.look for thing in scene.things)
    sizes_told(text, scene)
    background = re.search(r"on a (\w+) background|a (\w+) background with|on (\w+)[.?]$", text)
    assert background is None or scene.background in background.groups()
    word = re.search(r"the (?:word|text) (\w+)", text)
    assert (word.group(1) if word else None) == scene.word
    related = relation_told(text)
    facts = [(x.look, r, y.look) for x, r, y in scene.relations()]
    facts += [(y.look, flip(r), x.look) for x, r, y in scene.relations()]
    assert related is None or related in facts
    place = re.search(r"in the (top|bottom) (left|right)|in the (middle)", text)
    if place:
        cell = "center" if place.group(3) else f"{place.group(1)} {place.group(2)}"
        assert scene.things[0].cell == cell
    band = re.search(r"at the (top|bottom)", text)
    assert band is None or band.group(1) == scene.band


def flip(relation: str) -> str:
    return {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_and_prompts_are_true(split: str) -> None:
    rng = random.Random(5)
    for scene in make_scenes(split, 500):  # type: ignore[arg-type]
        check(caption(scene, rng), scene)
        check(prompt(scene, rng).text, scene)


def test_prompts_say_what_they_state() -> None:
    rng = random.Random(6)
    for scene in make_scenes("test", 500):
        told = prompt(scene, rng)
        assert ("size" in told.states) == sizes_told(told.text, scene)
        assert ("relation" in told.states) == (relation_told(told.text) is not None)
        assert ("background" in told.states) == (f" {scene.background}" in told.text)
        assert ("word" in told.states) == (scene.word is not None)
        assert "count" in told.states
        things = {"shape", "colour", "object"}
        assert told.states & things == (things if scene.things else set())
        place = re.search(r"in the (top|bottom|center|middle)", told.text)
        assert ("location" in told.states) == (place is not None and bool(scene.things))


def test_pairs_always_state_their_relation() -> None:
    rng = random.Random(7)
    for scene in make_scenes("val", 100, kind="pair"):
        assert "relation" in prompt(scene, rng).states


def test_wording_varies() -> None:
    scene = Scene((Thing("star", "orange", "small", "center"),), "tan")
    texts = {prompt(scene, random.Random(i)).text for i in range(300)}
    assert len(texts) > 100
    assert len({caption_question(random.Random(i)) for i in range(50)}) > 6


def test_empty_scene_is_told() -> None:
    text = caption(Scene((), "mint"), random.Random(0))
    assert "an empty mint background" in text


def test_grammar() -> None:
    assert a("orange star") == "an orange star" and a("red star") == "a red star"
    assert plural("red cross") == "red crosses" and plural("ring") == "rings"
    assert counted(1, "ring") == "a ring" and counted(3, "cross") == "three crosses"
    assert listed(["x"]) == "x" and listed(["x", "y", "z"]) == "x, y and z"


def test_inventory_names_everything_by_rows() -> None:
    things = (
        Thing("ring", "blue", "small", "bottom left"),
        Thing("star", "orange", "large", "bottom right"),
    )
    scene = Scene(things[::-1], "mint", word="map", band="top")
    assert inventory(scene) == (
        "two objects: a small blue ring in the bottom left, a large orange star in the bottom "
        "right, the word map at the top and a mint background."
    )
    assert inventory(Scene((), "tan")) == "zero objects: a tan background."
    assert inventory(Scene(things[:1], "gray")).startswith("one object: a small blue ring")


def test_inventories_differ_for_scenes_that_differ() -> None:
    scenes = list(make_scenes("train", 300))
    settled = {
        (frozenset(s.things), s.background, s.word, s.band if s.word else None) for s in scenes
    }
    assert len({inventory(scene) for scene in scenes}) == len(settled)


def test_requests_for_what_is_unnamed_tell_one_of_colour_and_shape() -> None:
    rng = random.Random(3)
    both = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
    either = re.compile(f"({'|'.join(COLOURS)}) object|{'|'.join(SHAPES)}")
    for scene in map(unnamed, map(strange_twin, make_scenes("train", 400))):
        for text in (prompt(scene, rng).text, full_request(scene, rng), inventory(scene)):
            assert UNNAMED not in text and not both.search(text), text
            assert not scene.things or either.search(text), text


def test_requests_for_odd_things_name_them() -> None:
    rng = random.Random(4)
    for scene in map(odd_twin, make_scenes("train", 200)):
        for text in (prompt(scene, rng).text, full_request(scene, rng)):
            for thing in scene.things:
                assert f"{thing.colour} {thing.shape}" in text


def test_what_an_answer_comes_to_stands_behind_its_colon() -> None:
    told = "the star is in the top left and the ring in the top right: left"
    assert [conclusion(text) for text in (told, "left", " two ")] == ["left", "left", "two"]
