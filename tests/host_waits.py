"""Operators that make the host wait for a GPU: those that read values, or move them over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their results, or the sizes of their results, depend on values that the host has to know.
READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "repeat_interleave",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
}


class HostWaits(TorchDispatchMode):
    """Collects, in `found`, the names of operators that would wait if all tensors were on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
        )
        sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
        if (name in READS and not sized) or by_mask:
            self.found.append(name)
        return func(*args, **kwargs)
