"""Connected components of a mask, in numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def label(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Number the 4-connected components of mask [H, W] from 1, in reading order.

    Returns (labels [H, W], 0 outside the mask; number of components).
    """
    height, width = mask.shape
    stride = width + 1  # an empty column ends every run of pixels at its row's end
    padded = np.zeros((height, stride), dtype=np.int8)
    padded[:, :width] = mask
    steps = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    roots = _join(len(starts), *_touching_runs(starts, ends, stride))
    _, numbers = np.unique(roots, return_inverse=True)
    labels = np.zeros(height * stride, dtype=np.int32)
    inside = padded.ravel() == 1
    labels[inside] = np.repeat(numbers.astype(np.int32) + 1, ends - starts)
    return labels.reshape(height, stride)[:, :width], int(numbers.max(initial=-1)) + 1


def boxes(labels: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where the components of `label` lie: (boxes [count, 4], areas [count]).

    A box is top, left, bottom, right in pixels, bottom and right exclusive.
    """
    rows, columns = np.nonzero(labels)
    numbers = labels[rows, columns]
    order = np.argsort(numbers, kind="stable")
    rows, columns = rows[order], columns[order]
    areas = np.bincount(numbers)[1:]
    if not len(areas):
        return np.zeros((0, 4), dtype=np.intp), areas
    first = np.cumsum(areas) - areas
    found = [
        np.minimum.reduceat(rows, first),
        np.minimum.reduceat(columns, first),
        np.maximum.reduceat(rows, first) + 1,
        np.maximum.reduceat(columns, first) + 1,
    ]
    return np.stack(found, axis=1), areas


def _touching_runs(
    starts: NDArray[np.intp], ends: NDArray[np.intp], stride: int
) -> tuple[list[int], list[int]]:
    """Pairs (run, run above it) that share a column."""
    first = np.searchsorted(ends, starts - stride, side="right")
    last = np.searchsorted(starts, ends - stride, side="left")
    counts = np.maximum(last - first, 0)
    lower = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(lower)) - np.repeat(np.cumsum(counts) - counts, counts)
    return lower.tolist(), (first[lower] + within).tolist()


def _join(count: int, lower: list[int], upper: list[int]) -> NDArray[np.intp]:
    """The lowest run of each run's component (union-find with path halving)."""
    parent = list(range(count))

    def find(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    for a, b in zip(lower, upper, strict=True):
        root_a, root_b = find(a), find(b)
        parent[max(root_a, root_b)] = min(root_a, root_b)
    return np.array([find(run) for run in range(count)], dtype=np.intp)
