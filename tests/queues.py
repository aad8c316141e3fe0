"""Devices without a GPU: what they are given, they do later.

`LateQueue` does nothing until somebody waits, and then only what lies in front of the mark, so that
whoever reads or overwrites memory too early is found out every time. `ThreadQueue` computes on a
thread of its own while the host goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from threading import Event, RLock, Thread
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from kelix_rt import Engine
from kelix_rt.config import EngineConfig
from kelix_rt.device_queue import DeviceQueue

Work: TypeAlias = Callable[[], object]
Load: TypeAlias = "Callable[..., tuple[Engine, LateQueue]]"


def as_on_a_gpu(patch: pytest.MonkeyPatch, queue: DeviceQueue) -> None:
    """Engines on the CPU overlap, too, over this device; their graphs are recorded by hand."""
    patch.setattr(EngineConfig, "on_device", lambda self, _: replace(self, cuda_graphs=False))
    patch.setattr("kelix_rt.runner.device_queue", lambda _: queue)


class LateQueue:
    """Work that waits for somebody to wait for it. taken, done: calls of `run`, and those made."""

    device = torch.device("cpu")
    shares_memory = False

    def __init__(self) -> None:
        self._work: deque[Work] = deque()
        self.taken = self.done = 0
        self._broken = 0  # what was taken up to here is lost: an error came in front of it
        self._error: Exception | None = None
        self._lock = RLock()  # pictures are waited for by another thread

    def run(self, work: Work) -> None:
        self._work.append(work)
        self.taken += 1

    def mark(self) -> LateMark:
        return LateMark(self, self.taken)

    def host_zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def reach(self, place: int) -> None:
        with self._lock:
            self._reach(place)

    def _reach(self, place: int) -> None:
        try:
            while self.done < place:
                self.done += 1
                self._work.popleft()()
        except Exception as error:
            self._work.clear()
            self._broken = self.done = self.taken
            self._error = error
        if place <= self._broken and self._error is not None:
            raise self._error


class LateMark:
    """After `place` pieces of work."""

    def __init__(self, queue: LateQueue, place: int) -> None:
        self._queue = queue
        self.place = place

    def wait(self) -> None:
        self._queue.reach(self.place)


class ThreadQueue:
    """A thread that works in order; an error of its work is raised by the next wait.

    starved: how often it found nothing to do.
    """

    device = torch.device("cpu")
    shares_memory = False

    def __init__(self) -> None:
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self.error: BaseException | None = None
        self.starved = 0
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            self.starved += self._work.empty()
            work = self._work.get()
            if work is None:
                return
            try:
                work()
            except BaseException as error:
                self.error = error

    def run(self, work: Work) -> None:
        self._work.put(work)

    def mark(self) -> ThreadMark:
        reached = Event()
        self._work.put(reached.set)
        return ThreadMark(self, reached)

    def host_zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()


class ThreadMark:
    """Reached once the thread gets there."""

    def __init__(self, queue: ThreadQueue, reached: Event) -> None:
        self._queue = queue
        self._reached = reached

    def wait(self) -> None:
        assert self._reached.wait(timeout=60), "the device does not get there"
        error, self._queue.error = self._queue.error, None
        if error is not None:
            raise error
