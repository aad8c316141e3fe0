"""Which device and dtype to run on. Loads no native library unless a GPU is chosen."""

from __future__ import annotations

import torch

from kelix_rt.errors import ConfigError, NativeError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(device: str | torch.device, *, kernels: bool = True) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU.

    kernels: something will run there. Raises ConfigError for a device that is not there,
    NativeError for a GPU that the library has no kernels for.
    """
    if device == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            chosen = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device: {device!r} is not a device: {error}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be a CPU or a CUDA GPU, got {device!r}")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {device!r} needs a GPU and a torch built for it; use 'cpu'")
        if (chosen.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ConfigError(f"device: {device!r} is not there, torch sees {count} GPUs")
        if kernels:
            _require_kernels()
    return chosen


def _require_kernels() -> None:
    from kelix_rt.ops import build_info

    if not build_info()["cuda"]:
        raise NativeError(
            "device: there is a GPU, but kelix_rt was built without nvcc; build its kernels with "
            "`pip install -e '.[cuda]' && pip install -e .` in the source directory, or choose "
            "device 'cpu'"
        )


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto": what the checkpoint stores."""
    if dtype == "auto":
        return None
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return chosen
