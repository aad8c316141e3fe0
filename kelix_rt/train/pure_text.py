"""Samples of pure text: words, letters and numbers, without a picture."""

from __future__ import annotations

import random

from kelix_rt.train.world_scene import COLOURS, OPPOSITES, SHAPES, WORDS
from kelix_rt.train.world_text import NUMBERS, Question, a

CHAT = (
    ("hello.", "hello. i can see and draw simple pictures."),
    ("hi.", "hello. i can see and draw simple pictures."),
    ("who are you?", "i am kelix tiny."),
    ("what is your name?", "i am kelix tiny."),
    ("what can you do?", "i can see and draw simple pictures."),
    ("thank you.", "you are welcome."),
    ("which shapes do you know?", f"{', '.join(SHAPES)}."),
    ("which colors do you know?", f"{', '.join(COLOURS)}."),
)
OPPOSITE_WORDS = {
    **OPPOSITES,
    **{"top": "bottom", "bottom": "top", "small": "large", "large": "small"},
    **{"black": "white", "white": "black", "yes": "no", "no": "yes"},
}
SIDES = {"triangle": 3, "square": 4, "diamond": 4}


def text_sample(rng: random.Random) -> Question:
    """A question about words, letters and numbers."""
    makers = (_spelling, _letters, _sum, _opposite, _class, _sides, _next, _echo, _chat)
    text, answer = rng.choice(makers)(rng)
    return Question("text", text, answer)


def _spelling(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return rng.choice(("spell {}.", "how do you spell {}?")).format(word), " ".join(word)


def _letters(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return rng.choice(
        (
            (f"what is the first letter of {word}?", word[0]),
            (f"what is the last letter of {word}?", word[-1]),
            (f"how many letters does {word} have?", NUMBERS[len(word)]),
        )
    )


def _sum(rng: random.Random) -> tuple[str, str]:
    total = rng.randint(1, 10)
    part = rng.randint(0, total)
    if rng.random() < 0.5:
        return f"what is {NUMBERS[part]} plus {NUMBERS[total - part]}?", NUMBERS[total]
    return f"what is {NUMBERS[total]} minus {NUMBERS[part]}?", NUMBERS[total - part]


def _opposite(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(list(OPPOSITE_WORDS))
    return f"what is the opposite of {word}?", OPPOSITE_WORDS[word]


def _class(rng: random.Random) -> tuple[str, str]:
    word = rng.choice((*SHAPES, *COLOURS))
    return f"is {word} a color or a shape?", "color" if word in COLOURS else "shape"


def _sides(rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(list(SIDES))
    return f"how many sides does {a(shape)} have?", NUMBERS[SIDES[shape]]


def _next(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(0, 9)
    if rng.random() < 0.5:
        return f"what comes after {NUMBERS[number]}?", NUMBERS[number + 1]
    return f"what comes before {NUMBERS[number + 1]}?", NUMBERS[number]


def _echo(rng: random.Random) -> tuple[str, str]:
    count, word = rng.randint(1, 3), rng.choice((*WORDS, *SHAPES, *COLOURS))
    times = {1: "once", 2: "twice", 3: "three times"}[count]
    return f"say {word} {times}.", " ".join([word] * count)


def _chat(rng: random.Random) -> tuple[str, str]:
    return rng.choice(CHAT)
