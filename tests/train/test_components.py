"""Connected components against a flood fill written out."""

from __future__ import annotations

import numpy as np
import pytest

from kelix_rt.train.components import boxes, label


def flood_fill(mask: np.ndarray) -> np.ndarray:
    labels, count = np.zeros(mask.shape, dtype=int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        stack = [start]
        while stack:
            row, column = stack.pop()
            inside = 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]
            if inside and mask[row, column] and not labels[row, column]:
                labels[row, column] = count
                stack += [(row - 1, column), (row + 1, column), (row, column - 1)]
                stack.append((row, column + 1))
    return labels


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (17, 23)])
def test_label_equals_flood_fill(shape: tuple[int, int], density: float) -> None:
    mask = np.random.default_rng(7).random(shape) < density
    labels, count = label(mask)
    assert np.array_equal(labels, flood_fill(mask))
    assert count == labels.max()


def test_boxes_and_areas() -> None:
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:3, 2:6] = True
    mask[2:5, 5] = True
    mask[5, 0] = True
    found, areas = boxes(label(mask)[0])
    assert found.tolist() == [[1, 2, 5, 6], [5, 0, 6, 1]]
    assert areas.tolist() == [10, 1]


def test_nothing_has_no_boxes() -> None:
    found, areas = boxes(label(np.zeros((4, 4), dtype=bool))[0])
    assert found.shape == (0, 4) and len(areas) == 0
