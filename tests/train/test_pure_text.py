from __future__ import annotations

import random
import re

from kelix_rt.train.pure_text import text_sample
from kelix_rt.train.world_scene import COLOURS
from kelix_rt.train.world_text import NUMBERS


def test_samples_are_true() -> None:
    starts = set()
    for seed in range(1500):
        sample = text_sample(random.Random(seed))
        starts.add(sample.text.split()[0])
        assert sample.kind == "text" and sample.text == sample.text.lower() and sample.answer
        if match := re.fullmatch(r"what is (\w+) (plus|minus) (\w+)\?", sample.text):
            x, y = NUMBERS.index(match.group(1)), NUMBERS.index(match.group(3))
            assert NUMBERS.index(sample.answer) == (x + y if match.group(2) == "plus" else x - y)
        elif match := re.fullmatch(r"(?:spell|how do you spell) (\w+)[.?]", sample.text):
            assert sample.answer.replace(" ", "") == match.group(1)
        elif match := re.fullmatch(r"how many letters does (\w+) have\?", sample.text):
            assert NUMBERS.index(sample.answer) == len(match.group(1))
        elif match := re.fullmatch(r"what is the (first|last) letter of (\w+)\?", sample.text):
            assert sample.answer == match.group(2)[0 if match.group(1) == "first" else -1]
        elif match := re.fullmatch(r"what comes (after|before) (\w+)\?", sample.text):
            step = 1 if match.group(1) == "after" else -1
            assert NUMBERS.index(sample.answer) == NUMBERS.index(match.group(2)) + step
        elif match := re.fullmatch(r"is (\w+) a color or a shape\?", sample.text):
            assert sample.answer == ("color" if match.group(1) in COLOURS else "shape")
        elif match := re.fullmatch(r"say (\w+) (once|twice|three times)\.", sample.text):
            times = {"once": 1, "twice": 2, "three times": 3}[match.group(2)]
            assert sample.answer.split() == [match.group(1)] * times
    assert {"what", "spell", "say", "is", "hello.", "how"} <= starts
