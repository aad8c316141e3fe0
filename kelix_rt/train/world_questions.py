"""Questions about scenes with their answers.

How two things lie to each other is answered with where both of them lie in front, which a small
model reads from a picture more easily than the comparison.

Wrong alternatives ("is there a red star?" - "no") never name a combination held out from the
scene's split, so that train texts know nothing of the combinations tested.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kelix_rt.train.world_scene import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITES,
    SHAPES,
    UNNAMED,
    WORDS,
    Scene,
    Thing,
    unnamed,
)
from kelix_rt.train.world_splits import (
    Combination,
    count_combination,
    look_combination,
    relation_combination,
    split_of,
    split_of_combination,
    word_combination,
)
from kelix_rt.train.world_text import NUMBERS, RELATION_PHRASES, Question, a, fill, plural

QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": (
        "what color {be} the {noun}?",
        "what colour {be} the {noun}?",
        "which color {do} the {noun} have?",
        "tell me the color of the {noun}.",
    ),
    "shape": (
        "what shape {be} the {noun}?",
        "which shape {do} the {noun} have?",
        "tell me the shape of the {noun}.",
    ),
    "count": (
        "how many {noun} are there?",
        "how many {noun} do you see?",
        "how many {noun} are in the {{picture}}?",
        "count the {noun}.",
    ),
    "relation": (
        "where is the {noun} relative to the {other}?",
        "seen from the {other}, where is the {noun}?",
        "is the {noun} left, right, above or below the {other}?",
    ),
    "neighbour": ("what is {relation} the {noun}?", "which object is {relation} the {noun}?"),
    "location": ("where is the {noun}?", "where in the {{picture}} is the {noun}?"),
    "size": (
        "what size {be} the {noun}?",
        "how big {be} the {noun}?",
        "{be} the {noun} small or large?",
    ),
    "word": (
        "what does the text say?",
        "which word do you see?",
        "what word is in the {{picture}}?",
        "read the word.",
        "read the text.",
    ),
    "background": (
        "what color is the background?",
        "what colour is the background?",
        "which color does the background have?",
        "tell me the color of the background.",
    ),
}
# Kinds of picture questions, as evaluations list them.
QUESTION_KINDS = (*(kind for kind in QUESTIONS if kind != "neighbour"), "yesno")


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of every kind that the scene can answer (two of yesno), worded at random.

    What is odd has no name in them.
    """
    scene = unnamed(scene)
    makers = (_colour, _shape, _count, _relation, _location, _size, _word, _yesno, _yesno)
    found = [question for maker in makers for question in maker(scene, rng)]
    found.append(_ask("background", scene.background, rng))
    return list(dict.fromkeys(found))  # the two of yesno may be the same


def _ask(kind: str, answer: str, rng: random.Random, many: bool = False, **names: str) -> Question:
    words = {"be": "are", "do": "do"} if many else {"be": "is", "do": "does"}
    template = rng.choice(QUESTIONS[kind]).format(**words, **names)
    return Question("relation" if kind == "neighbour" else kind, fill(template, "", rng), answer)


def _by(things: Sequence[Thing], name: Callable[[Thing], str]) -> dict[str, list[Thing]]:
    """Things by what `name` calls them; those it has no name for are left out."""
    found: dict[str, list[Thing]] = {}
    for thing in things:
        if called := name(thing):
            found.setdefault(called, []).append(thing)
    return found


def _colour(scene: Scene, rng: random.Random) -> list[Question]:
    groups = [g for g in _groups(scene, _shape_name, "shape") if len(set(map(_hue, g[1]))) == 1]
    groups = [g for g in groups if _hue(g[1][0])]
    if not groups:
        return []
    shape, group = rng.choice(groups)
    many = len(group) > 1
    return [_ask("colour", _hue(group[0]), rng, many, noun=plural(shape) if many else shape)]


def _shape(scene: Scene, rng: random.Random) -> list[Question]:
    groups = [g for g in _groups(scene, _hued, "colour") if len(set(map(_shape_name, g[1]))) == 1]
    groups = [g for g in groups if _shape_name(g[1][0])]
    if not groups:
        return []
    noun, group = rng.choice(groups)
    many = len(group) > 1
    return [_ask("shape", group[0].shape, rng, many, noun=plural(noun) if many else noun)]


def _groups(
    scene: Scene, name: Callable[[Thing], str], attribute: str
) -> list[tuple[str, list[Thing]]]:
    """Things by name; where the attribute of all of them is unnamed, all together as objects."""
    if scene.things and all(getattr(thing, attribute) == UNNAMED for thing in scene.things):
        return [("object", list(scene.things))]
    return list(_by(scene.things, name).items())


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    if not scene.things:
        return []
    nouns = _countable(scene)
    noun = rng.choice(("object", *nouns)) if rng.random() < 0.5 else "object"
    return [_ask("count", NUMBERS[nouns.get(noun, len(scene.things))], rng, noun=plural(noun))]


def _countable(scene: Scene) -> dict[str, int]:
    """Nouns for things of the scene and how many they name."""
    names = (lambda _: "object", _shape_name, _hued, _look)
    return {noun: len(group) for name in names for noun, group in _by(scene.things, name).items()}


def _relation(scene: Scene, rng: random.Random) -> list[Question]:
    relations = scene.relations()
    if not relations:
        return []
    first, relation, second = rng.choice(relations)
    if rng.random() < 0.5:
        first, relation, second = second, OPPOSITES[relation], first
    # Of three or more things, several could be left of one.
    if len(scene.things) == 2 and rng.random() < 0.3:
        phrase = rng.choice(RELATION_PHRASES[relation])
        noun = _precisely(second)
        return [_ask("neighbour", a(_precisely(first)), rng, relation=phrase, noun=noun)]
    noun, other = _name(first, scene, rng), _name(second, scene, rng)
    places = f"the {noun} is in the {first.cell} and the {other} in the {second.cell}"
    return [_ask("relation", f"{places}: {relation}", rng, noun=noun, other=other)]


def _location(scene: Scene, rng: random.Random) -> list[Question]:
    unique = [group[0] for group in scene.groups().values() if len(group) == 1]
    if not unique:
        return []
    thing = rng.choice(unique)
    return [_ask("location", thing.cell, rng, noun=_name(thing, scene, rng))]


def _size(scene: Scene, rng: random.Random) -> list[Question]:
    groups = [g for g in scene.groups().values() if len({thing.size for thing in g}) == 1]
    if not groups:
        return []
    group = rng.choice(groups)
    many = len(group) > 1
    noun = plural(_precisely(group[0])) if many else _name(group[0], scene, rng)
    return [_ask("size", group[0].size, rng, many, noun=noun)]


def _word(scene: Scene, rng: random.Random) -> list[Question]:
    return [] if scene.word is None else [_ask("word", scene.word, rng)]


def _name(thing: Thing, scene: Scene, rng: random.Random) -> str:
    """A noun that names one thing only: by its look, or shorter where that is enough."""
    names = [_precisely(thing)]
    counts = _countable(scene)
    names += [n for n in (_shape_name(thing), _hued(thing)) if counts.get(n) == 1]
    return names[0] if rng.random() < 0.5 else rng.choice(names)


def _yesno(scene: Scene, rng: random.Random) -> list[Question]:
    makers = [_is_background]
    if scene.word is not None:
        makers += [_is_word, _is_word]
    if scene.things:
        makers += [_is_there, _is_there, _is_colour, _is_count]
    if scene.relations():
        makers += [_is_related, _is_related]
    true, false = rng.choice(makers)(scene, rng)
    wrong = [text for text, named in false if _may_name(scene, named)]
    if wrong and (rng.random() < 0.5 or not true):
        return [Question("yesno", rng.choice(wrong), "no")]
    return [Question("yesno", rng.choice(true), "yes")] if true else []


def _may_name(scene: Scene, named: Combination | None) -> bool:
    split = split_of(scene)
    return named is None or split is None or split_of_combination(named) in ("train", split)


# Each maker gives (true statements, [(false statement, combination it names)]) as questions.
Statements = tuple[list[str], list[tuple[str, Combination | None]]]


def _is_there(scene: Scene, rng: random.Random) -> Statements:
    present = list(scene.groups())
    if any(UNNAMED in look for look in present):
        return [], []
    # Near misses half of the time: the colour or the shape is there, not both in one thing.
    colours = [c for c, _ in present] if rng.random() < 0.5 else COLOURS
    shapes = SHAPES if colours is not COLOURS else [s for _, s in present]
    false = [(c, s) for c in colours for s in shapes if (c, s) not in present]
    ask = rng.choice(("is there {}?", "do you see {}?", "does the {{picture}} show {}?"))

    def text(colour: str, shape: str) -> str:
        return fill(ask.format(a(f"{colour} {shape}")), "", rng)

    true = [text(c, s) for (c, s), group in scene.groups().items() if len(group) == 1]
    return true, [(text(c, s), look_combination(c, s)) for c, s in false]


def _is_colour(scene: Scene, rng: random.Random) -> Statements:
    single = [g[0] for g in _by(scene.things, _shape_name).values() if len(g) == 1]
    single = [thing for thing in single if _hue(thing)]
    true = [f"is the {t.shape} {t.colour}?" for t in single]
    false = [
        (f"is the {t.shape} {colour}?", look_combination(colour, t.shape))
        for t in single
        for colour in COLOURS
        if colour != t.colour
    ]
    return true, list(false)


def _is_count(scene: Scene, rng: random.Random) -> Statements:
    noun, count = rng.choice(list(_countable(scene).items()))

    def text(number: int) -> str:
        if number == 1:
            return f"is there one {noun}?"
        return f"are there {NUMBERS[number]} {plural(noun)}?"

    shape = noun.split()[-1]
    false: list[tuple[str, Combination | None]] = []
    for number in range(1, 5):
        named = None if shape == "object" or number == 1 else count_combination(number, shape)
        if number != count:
            false.append((text(number), named))
    return [text(count)], false


def _is_related(scene: Scene, rng: random.Random) -> Statements:
    first, relation, second = rng.choice(scene.relations())
    names = _name(first, scene, rng), _name(second, scene, rng)

    def text(name: str) -> str:
        return f"is the {names[0]} {rng.choice(RELATION_PHRASES[name])} the {names[1]}?"

    wrong = [name for name in RELATION_PHRASES if name != relation]
    false: list[tuple[str, Combination | None]] = [
        (text(name), relation_combination(first.shape, name, second.shape)) for name in wrong
    ]
    return [text(relation)], false


def _is_word(scene: Scene, rng: random.Random) -> Statements:
    ask = rng.choice(("does the text say {}?", "is the word {}?"))
    true = ask.format(scene.word)
    false = [
        (ask.format(word), word_combination(word, scene.background))
        for word in WORDS
        if word != scene.word
    ]
    return [true], list(false)


def _is_background(scene: Scene, rng: random.Random) -> Statements:
    true = f"is the background {scene.background}?"
    return [true], [(f"is the background {b}?", None) for b in BACKGROUNDS if b != scene.background]


def _shape_name(thing: Thing) -> str:
    return "" if thing.shape == UNNAMED else thing.shape


def _hue(thing: Thing) -> str:
    return "" if thing.colour == UNNAMED else thing.colour


def _hued(thing: Thing) -> str:
    return f"{thing.colour} object" if _hue(thing) else ""


def _look(thing: Thing) -> str:
    return "" if UNNAMED in thing.look else " ".join(thing.look)


def _precisely(thing: Thing) -> str:
    """The name that says most of it."""
    return _look(thing) or _shape_name(thing) or _hued(thing)
