"""A guard for what one thread at a time may enter."""

from __future__ import annotations

import threading
from types import TracebackType

from kelix_rt.errors import BusyError


class OneThread:
    """Used with `with`: a thread that enters while another is inside gets a BusyError, before it
    can change anything. The thread inside may enter again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "the engine is not thread-safe, and another thread is inside a step: let one "
                "thread call it, or give the calls their turns with a lock"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
