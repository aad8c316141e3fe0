"""kelix_rt: an accelerated runtime for Kelix, the fully discrete multimodal model.

Names are imported on first use; importing the package touches neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kelix_rt.config import EngineConfig
    from kelix_rt.engine import Engine
    from kelix_rt.errors import (
        AsleepError,
        BusyError,
        CapacityError,
        ConfigError,
        InputError,
        KelixError,
        NativeError,
        WeightError,
    )
    from kelix_rt.request import (
        BlockEvent,
        BlockOutput,
        ChatOutput,
        ImageCodes,
        ImageDone,
        ImageOutput,
        ImageProgress,
        Output,
        Prompt,
        RenderParams,
        RequestDone,
        RequestFailed,
        SamplingParams,
        SlotSampling,
        TextDelta,
    )

__version__ = "0.1.0"

_MODULES = {
    "kelix_rt.config": ("EngineConfig",),
    "kelix_rt.engine": ("Engine",),
    "kelix_rt.errors": (
        "AsleepError", "BusyError", "CapacityError", "ConfigError", "InputError", "KelixError",
        "NativeError", "WeightError",
    ),
    "kelix_rt.request": (
        "BlockEvent", "BlockOutput", "ChatOutput", "ImageCodes", "ImageDone", "ImageOutput",
        "ImageProgress", "Output", "Prompt", "RenderParams", "RequestDone", "RequestFailed",
        "SamplingParams", "SlotSampling", "TextDelta",
    ),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AsleepError", "BlockEvent", "BlockOutput", "BusyError", "CapacityError", "ChatOutput",
    "ConfigError", "Engine", "EngineConfig", "ImageCodes", "ImageDone", "ImageOutput",
    "ImageProgress", "InputError", "KelixError", "NativeError", "Output", "Prompt", "RenderParams",
    "RequestDone", "RequestFailed", "SamplingParams", "SlotSampling", "TextDelta", "WeightError",
    "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kelix_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
