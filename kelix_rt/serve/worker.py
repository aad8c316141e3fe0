"""The thread that owns an engine, and what coroutines see of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from kelix_rt.errors import KelixError
from kelix_rt.request import Event, RequestDone, RequestFailed

if TYPE_CHECKING:
    from kelix_rt.engine import Engine
    from kelix_rt.stats import EngineStats


class OverloadedError(KelixError, RuntimeError):
    """As many requests as the server takes at once are unfinished; try again later."""


class EndedError(KelixError, RuntimeError):
    """The server is shutting down, or its engine has failed."""


class _Stream:
    """What one coroutine waits for; `put` may be called from any thread."""

    def __init__(self) -> None:
        self.number: int | None = None  # the request's, once it is queued; the worker's thread only
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, item: Any) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def get(self) -> Any:
        """The next item; an exception is raised."""
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item


class EngineWorker:
    """Runs an engine on a thread of its own, which alone touches it; coroutines add requests.

    limit: unfinished requests taken at once, running and queued. `start` comes first.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self.limit = limit
        self._orders: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._running: dict[int, _Stream] = {}  # the thread's own
        self._lock = threading.Lock()  # of the two below
        self._open: set[_Stream] = set()
        self._ended: str | None = "the server has not been started"
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kelix-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; once."""
        self._ended = None
        self._thread.start()

    @property
    def ended(self) -> str | None:
        """Why no more requests are taken; None while they are."""
        return self._ended

    async def events(self, add: Callable[[Engine], int]) -> AsyncGenerator[Event, None]:
        """The events of the request that `add` queues, up to its RequestDone.

        Raises what `add` raises and what the request fails with, OverloadedError and EndedError.
        Leaving the iterator early, or being cancelled in it, aborts the request.
        """
        stream = self._enter(limited=True)
        try:
            self._orders.put(partial(self._add, stream, add))
            while True:
                event = await stream.get()
                yield event
                if isinstance(event, RequestDone):
                    return
        finally:
            self._leave(stream)

    async def stats(self) -> EngineStats:
        """`Engine.stats`, read between two steps."""
        stream = self._enter(limited=False)
        try:
            self._orders.put(lambda: stream.put(self._engine.stats()))
            found: EngineStats = await stream.get()
            return found
        finally:
            self._leave(stream)

    async def close(self) -> None:
        """Ends the thread; requests that are unfinished fail with EndedError."""
        self._orders.put(self._close)
        await asyncio.to_thread(self._thread.join)

    def _enter(self, *, limited: bool) -> _Stream:
        with self._lock:
            if self._ended is not None:
                raise EndedError(self._ended)
            if limited and len(self._open) >= self.limit:
                raise OverloadedError(
                    f"{self.limit} requests are unfinished, as many as are taken at once; try "
                    "again later"
                )
            stream = _Stream()
            self._open.add(stream)
        return stream

    def _leave(self, stream: _Stream) -> None:
        self._forget(stream)
        self._orders.put(partial(self._abort, stream))

    def _forget(self, stream: _Stream) -> None:
        """Its place is free for another, though what it was sent may not be read yet."""
        with self._lock:
            self._open.discard(stream)

    def _run(self) -> None:
        ended = "the server is shutting down"
        try:
            while not self._closing:
                self._follow_orders(wait=not self._engine.has_work)
                for event in self._engine.step():
                    self._deliver(event)
            self._engine.discard(list(self._running))
        except BaseException as error:
            ended = f"the engine has failed: {error!r}"
            raise
        finally:
            with self._lock:
                self._ended = ended
                for stream in self._open:
                    stream.put(EndedError(ended))

    def _follow_orders(self, wait: bool) -> None:
        if wait:
            self._orders.get()()
        while not self._orders.empty():
            self._orders.get()()

    def _close(self) -> None:
        self._closing = True

    def _add(self, stream: _Stream, add: Callable[[Engine], int]) -> None:
        try:
            stream.number = add(self._engine)
        except Exception as error:
            stream.put(error)
            self._forget(stream)
        else:
            self._running[stream.number] = stream

    def _abort(self, stream: _Stream) -> None:
        if stream.number is not None and self._running.pop(stream.number, None) is not None:
            self._engine.discard([stream.number])

    def _deliver(self, event: Event) -> None:
        stream = self._running.get(event.request_id)
        if stream is None:  # nobody waits for it any more
            return
        stream.put(event.error if isinstance(event, RequestFailed) else event)
        if isinstance(event, RequestDone | RequestFailed):
            del self._running[event.request_id]
            self._forget(stream)
