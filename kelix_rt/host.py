"""The host library (`kelix_rt._host`), or what to do where it is not built."""

from __future__ import annotations

import sys

from kelix_rt.errors import NativeError

try:
    from kelix_rt._host import PagePool
except ImportError as error:
    raise NativeError(
        "kelix_rt: the host library is not built for Python "
        f"{sys.version_info.major}.{sys.version_info.minor} ({error}); run `pip install -e .` "
        "in the source directory"
    ) from error

__all__ = ["PagePool"]
