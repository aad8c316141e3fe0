"""Where the work of block steps goes: in order, and maybe later than the host gives it.

A GPU takes work at once and does it when it gets there; the host learns that it has by a mark. On a
CPU the work is done before the call returns, and device and host share their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in a queue."""

    def wait(self) -> None:
        """Returns once all work in front of the mark is done; raises what the device reports."""


class DeviceQueue(Protocol):
    """Work in order. shares_memory: the device computes in the host's own memory."""

    device: torch.device
    shares_memory: bool

    def run(self, work: Callable[[], object]) -> None:
        """Takes work that launches on the device and does not wait for it."""

    def mark(self) -> Mark:
        """The end of the work taken so far."""

    def host_zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies to and from without making the host wait."""


class InlineQueue:
    """A CPU: work is done when `run` returns."""

    device = torch.device("cpu")
    shares_memory = True

    def run(self, work: Callable[[], object]) -> None:
        """Does it."""
        work()

    def mark(self) -> Mark:
        """Nothing is left to wait for."""
        return _Past()

    def host_zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Ordinary memory."""
        return torch.zeros(shape, dtype=dtype)


class CudaQueue:
    """The current stream of a GPU, which must be the same for all steps of an engine."""

    shares_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, work: Callable[[], object]) -> None:
        """Launches it."""
        work()

    def mark(self) -> Mark:
        """An event behind the work launched so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _Event(event)

    def host_zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)


class _Past:
    def wait(self) -> None:
        """Returns at once."""


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def device_queue(device: torch.device) -> DeviceQueue:
    """The queue of a device."""
    return CudaQueue(device) if device.type == "cuda" else InlineQueue()
