"""Memory that training frees stays with the process, to be used again by its next step."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)


def keep_freed_memory(most: int = 2**30) -> bool:
    """Tells glibc's malloc to keep up to `most` free bytes and blocks as large for the process.

    A step frees and allocates the same tensors as the one before it. By default (128 KiB, growing)
    many pages go back to the system in between and come again zeroed, each by a page fault: about
    10,000 in a step of the DiT. Returns False, and changes nothing, where malloc is another one.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, most) for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
