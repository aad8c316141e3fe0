"""Batches made ahead of their step by other processes, for devices faster than the drawing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
_MOST_WORKERS = 12


def workers_for(device: torch.device | str) -> int:
    """Processes that make batches: none for a CPU, which has no idle cores while it trains."""
    if torch.device(device).type == "cpu":
        return 0
    return min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) - 2))


class Ahead(Generic[T]):
    """Calls `make(step)` for step after step, in `workers` processes that run ahead.

    make: must depend on the step alone and stay on the CPU. Steps usually come in order; a jump
    starts anew. With 0 workers `make` is called when its step comes.
    """

    def __init__(self, make: Callable[[int], T], steps: int, workers: int) -> None:
        self._make, self._steps, self._workers = make, steps, workers
        self._next = -1
        self._batches: Iterator[T] = iter(())

    def __call__(self, step: int) -> T:
        """The batch of a step below `steps`."""
        if not self._workers:
            return self._make(step)
        if step != self._next:
            loader: DataLoader[T] = DataLoader(
                _Steps(self._make, step, self._steps),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=4,
                multiprocessing_context="fork",  # nothing is pickled; workers never touch a GPU
            )
            self._batches = iter(loader)
        self._next = step + 1
        return next(self._batches)


class _Steps(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any], first: int, steps: int) -> None:
        self._make, self._first, self._steps = make, first, steps

    def __len__(self) -> int:
        return self._steps - self._first

    def __getitem__(self, index: int) -> Any:
        return self._make(self._first + index)
