"""Shapes and dtypes of results, for torch.compile, torch.export and the meta device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Fake = TypeVar("Fake", bound=Callable[..., Any])


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """Registers the fake kernel of the operator `kelix::<name>`.

    torch also takes it for a call in which a single tensor is on the meta device, such as a weight
    that was never loaded; the others' results would be memory that nothing wrote, so that raises.
    """

    def register(fake: Fake) -> Fake:
        @wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            devices = sorted({str(tensor.device) for tensor in tensors})
            if "meta" in devices and len(devices) > 1:
                raise RuntimeError(
                    f"{name}: all tensors must be on one device, got {', '.join(devices)}; one on "
                    "meta has no values: load or initialise it first"
                )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"kelix::{name}", checked)
        return fake

    return register
