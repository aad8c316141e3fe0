"""Which questions about a scene are asked."""

from __future__ import annotations

import random

from kelix_rt.train.world_questions import questions
from kelix_rt.train.world_scene import Scene
from kelix_rt.train.world_text import Question


def some(scene: Scene, rng: random.Random, most: int) -> list[Question]:
    """Different questions of all kinds, `most` at most."""
    known = list(dict.fromkeys((*questions(scene, rng), *questions(scene, rng))))
    return rng.sample(known, min(most, len(known)))


def of_kind(kind: str, scene: Scene, rng: random.Random, most: int) -> list[Question]:
    """Different questions of one kind, `most` at most; the first of any where it has none."""
    known = [question for _ in range(most) for question in questions(scene, rng)]
    wanted = [question for question in known if question.kind == kind]
    return list(dict.fromkeys(wanted or known))[:most]
