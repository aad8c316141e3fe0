"""What can be said about a scene: captions, drawing prompts, and the words they are made of.

All texts are short lower-case sentences. They state only what the scene settles.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kelix_rt.train.world_scene import CELLS, OPPOSITES, UNNAMED, Scene, Thing

# fmt: off
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)
# fmt: on
RELATION_PHRASES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PICTURE_WORDS = ("picture", "image", "drawing")
REQUESTS = (
    "draw {}.",
    "please draw {}.",
    "can you draw {}?",
    "paint {}.",
    "show me {}.",
    "create a {picture} of {}.",
    "make a {picture} of {}.",
    "a {picture} of {}.",
    "i want a {picture} of {}.",
    "{}.",
)
CAPTIONS = (
    "{}.",
    "a {picture} of {}.",
    "the {picture} shows {}.",
    "this is {}.",
    "i see {}.",
)
CAPTION_QUESTIONS = (
    "describe the {picture}.",
    "what do you see?",
    "what is in the {picture}?",
    "what does the {picture} show?",
)
INVENTORY_QUESTIONS = (
    "what is where?",
    "what is where in the {picture}?",
    "describe the {picture} and tell me where the objects are.",
)


@dataclass(frozen=True)
class Prompt:
    """A request for a picture, and which attributes (keys of `judge`) it states."""

    text: str
    states: frozenset[str]


@dataclass(frozen=True)
class Question:
    """A question with its only right answer. kind: "colour", "yesno" ..., or "text"."""

    kind: str
    text: str
    answer: str


def conclusion(answer: str) -> str:
    """What an answer comes to: what stands behind its last colon, or all of it."""
    return answer.rpartition(":")[2].strip()


def caption(scene: Scene, rng: random.Random) -> str:
    """One sentence about everything in the scene."""
    return fill(rng.choice(CAPTIONS), description(scene, rng).text, rng)


def caption_question(rng: random.Random) -> str:
    """A question that a caption answers."""
    return fill(rng.choice(CAPTION_QUESTIONS), "", rng)


def inventory(scene: Scene) -> str:
    """All that is settled: how many objects, then every one by rows, the word, the background."""
    things = sorted(scene.things, key=lambda thing: CELLS.index(thing.cell))
    parts = [f"{a(_noun(thing, sized=True))} in the {thing.cell}" for thing in things]
    if scene.word is not None:
        parts.append(f"the word {scene.word} {_band_place(scene.band)}")
    parts.append(f"a {scene.background} background")
    noun = "object" if len(things) == 1 else "objects"
    return f"{NUMBERS[len(things)]} {noun}: {listed(parts)}."


def inventory_question(rng: random.Random) -> str:
    """A question that an inventory answers."""
    return fill(rng.choice(INVENTORY_QUESTIONS), "", rng)


def full_request(scene: Scene, rng: random.Random) -> str:
    """A drawing request that leaves nothing open: the inventory."""
    return fill(rng.choice(REQUESTS), inventory(scene).removesuffix("."), rng)


def prompt(scene: Scene, rng: random.Random) -> Prompt:
    """A drawing request in varied wording. It always states the objects and their relation."""
    told = description(scene, rng)
    return Prompt(fill(rng.choice(REQUESTS), told.text, rng), told.states)


def description(scene: Scene, rng: random.Random) -> Prompt:
    """A noun phrase for the scene, and what it states."""
    states = {"word"} if scene.word is not None else set()
    if not scene.things:
        states.add("count")
    phrase = _things_phrase(scene, rng, states)
    if scene.word is not None:
        phrase = _with_word(phrase, scene, rng)
    # The background is told more often than not; else the painter is free.
    if rng.random() < 0.75 or not phrase:
        states.add("background")
        phrase = _with_background(phrase, scene.background, rng)
    return Prompt(phrase, frozenset(states))


def a(noun: str) -> str:
    """The noun with its article: "an orange star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The noun in the plural: "red crosses"."""
    return noun + ("es" if noun.endswith("s") else "s")


def counted(count: int, noun: str) -> str:
    """A number of things: "a red ring", "two red rings"."""
    return a(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def listed(parts: Sequence[str]) -> str:
    """Parts as a list: "x", "x and y", "x, y and z"."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def fill(template: str, phrase: str, rng: random.Random) -> str:
    """Put a phrase and a word for "picture" into a template."""
    word = rng.choice(PICTURE_WORDS)
    text = template.format(phrase, picture=word)
    return text.replace("a image", "an image")


def _things_phrase(scene: Scene, rng: random.Random, states: set[str]) -> str:
    if not scene.things:
        return ""
    states |= {"shape", "colour", "object", "count"}
    sized = rng.random() < 0.4 and all(
        len({thing.size for thing in group}) == 1 for group in scene.groups().values()
    )
    if sized:
        states.add("size")
    relations = scene.relations()
    if len(scene.things) == 2 and relations:
        states.add("relation")
        return _relation_phrase(*relations[0], sized, rng)
    groups = list(scene.groups().values())
    rng.shuffle(groups)
    phrase = listed([counted(len(group), _noun(group[0], sized)) for group in groups])
    if len(scene.things) == 1 and rng.random() < 0.5:
        states.add("location")
        phrase = f"{phrase} {_place(scene.things[0].cell, rng)}"
    return phrase


def _relation_phrase(
    first: Thing, relation: str, second: Thing, sized: bool, rng: random.Random
) -> str:
    if rng.random() < 0.5:
        first, relation, second = second, OPPOSITES[relation], first
    words = rng.choice(RELATION_PHRASES[relation])
    return f"{a(_noun(first, sized))} {words} {a(_noun(second, sized))}"


def _noun(thing: Thing, sized: bool) -> str:
    """All that has a name: "small red ring", "small ring", "red object"."""
    words = [thing.size] if sized else []
    if thing.colour != UNNAMED:
        words.append(thing.colour)
    words.append("object" if thing.shape == UNNAMED else thing.shape)
    return " ".join(words)


def _place(cell: str, rng: random.Random) -> str:
    if cell == "center":
        return rng.choice(("in the center", "in the middle"))
    return rng.choice((f"in the {cell}", f"in the {cell} corner"))


def _with_word(phrase: str, scene: Scene, rng: random.Random) -> str:
    word = rng.choice((f"the word {scene.word}", f"the text {scene.word}"))
    if not phrase:
        if rng.random() < 0.5:
            return f"{word} {_band_place(scene.band)}"
        return word
    if rng.random() < 0.5:
        return f"{word} {_band_place(scene.band)} and {phrase}"
    return f"{phrase} and {word} {_band_place(scene.band)}"


def _band_place(band: str) -> str:
    return "in the center" if band == "center" else f"at the {band}"


def _with_background(phrase: str, background: str, rng: random.Random) -> str:
    if not phrase:
        return f"an empty {background} background"
    return rng.choice(
        (
            f"{phrase} on a {background} background",
            f"{phrase} on {background}",
            f"a {background} background with {phrase}",
        )
    )
