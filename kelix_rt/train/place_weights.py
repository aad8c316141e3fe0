"""How much the places of a picture weigh in the DiT's loss.

Most of a picture is background and most of the rest lies in large things, so the corners of small
things and the strokes of letters drown in a plain mean of the errors, which the report has. Where a
condition tells what lies where, the best velocity is the same whatever a place weighs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kelix_rt.train.token_labels import KINDS, token_labels
from kelix_rt.train.world_scene import SIZES, Scene

WEIGHTS = {"small": 8.0, "large": 2.0, "word": 4.0}  # of a place with it; of background 1


def place_weights(scene: Scene, side: int) -> Tensor:
    """float32 [side, side]: what the scene's places weigh, from what lies there nominally."""
    labels = token_labels(scene, side).view(side, side, len(KINDS))
    weights = torch.ones(side, side)
    weights[labels[..., KINDS.index("word")] > 0] = WEIGHTS["word"]
    for number, size in enumerate(SIZES, start=1):
        weights[labels[..., KINDS.index("size")] == number] = WEIGHTS[size]
    return weights
