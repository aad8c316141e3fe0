"""A CUDA graph without a GPU: the operators of a piece of work, called again on the same memory.

As a CUDA graph it knows nothing of the Python around them: whatever the host read or decided while
it was recorded is part of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class Recording:
    """Calls of operators in order; calling it makes them again, with results where they were."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls

    @torch.inference_mode()
    def __call__(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reads(self, tensor: Tensor) -> bool:
        """Whether a call takes the memory of `tensor`."""
        leaves = (leaf for _, args, kwargs, _ in self.calls for leaf in tree_leaves((args, kwargs)))
        return any(
            isinstance(leaf, Tensor) and leaf.data_ptr() == tensor.data_ptr() for leaf in leaves
        )


def record(work: Callable[[], None]) -> Recording:
    """Runs `work` and records it, as `kelix_rt.graphs.CudaRecorder` does."""
    tape = _Tape()
    with tape:
        work()
    assert tape.calls, "nothing was recorded"
    return Recording(tape.calls)
