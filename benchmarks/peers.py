"""Other people's code to compare with: taken where it is installed, named as absent where not."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch


def installed(module: str) -> ModuleType | None:
    """The module, or None where it is not installed; an installed one that breaks raises."""
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def compiled(call: Callable[[], object]) -> Callable[[], object] | str:
    """`call` under torch.compile, run once; why it cannot be, where the compiler fails."""
    torch.compiler.reset()
    fast = torch.compile(call, dynamic=False)
    try:
        fast()
    except Exception as error:  # the compiler raises many types: no C++ compiler, no Triton, ...
        return f"torch.compile: {type(error).__name__}"
    return fast
