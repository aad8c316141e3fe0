"""Calls that wait for requests: they run the loop, and get the events of their own requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import suppress
from typing import TYPE_CHECKING

from kelix_rt.errors import BusyError, KelixError
from kelix_rt.loop import Loop
from kelix_rt.request import Event, RequestDone, RequestFailed

if TYPE_CHECKING:
    from kelix_rt.runner import Runner
    from kelix_rt.scheduler import Scheduler


class Calls(Loop):
    """A loop whose callers may wait for some of its requests."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        super().__init__(runner, scheduler)
        self._left: deque[int] = deque()  # to be aborted, by callers that were not let in

    def discard(self, request_ids: Items[int]) -> None:
        """Aborts those of the requests that run, and drops the events nobody will read. While
        another thread is inside that is left to its next step."""
        for number in request_ids:
            self._mail[number] = deque()
            self._left.append(number)
        with suppress(BusyError), self._one_thread:
            self._abort_left()

    def _run_step(self) -> bool:
        self._abort_left()
        return super()._run_step()

    def _abort_left(self) -> None:
        while self._left:
            number = self._left.popleft()
            self.abort(number)
            self._mail.pop(number, None)

    def collect(self, request_id: int) -> Iterator[Event]:
        """The events of one request until its last one, running steps as needed; those of steps
        that other calls ran come first.

        Leaving the iterator early aborts the request.
        """
        mail = self._open(request_id)
        try:
            while True:
                while not mail:
                    self._run_for(request_id)
                event = mail.popleft()
                yield event
                if isinstance(event, RequestDone | RequestFailed):
                    return
        finally:
            self.discard([request_id])

    def run_to_end(self, request_ids: Items[int]) -> list[RequestDone | RequestFailed]:
        """Runs until these requests have ended; their last events, in the order given."""
        for number in request_ids:
            self._open(number)
        ended: dict[int, RequestDone | RequestFailed] = {}
        try:
            for number in request_ids:
                mail = self._mail[number]
                while number not in ended:
                    while not mail:
                        self._run_for(number)
                    event = mail.popleft()
                    if isinstance(event, RequestDone | RequestFailed):
                        ended[number] = event
        finally:
            self.discard(request_ids)
        return [ended[number] for number in request_ids]

    def _open(self, request_id: int) -> deque[Event]:
        """The events of a request from now on, and those that nobody has read yet."""
        own = (event for event in self._unread if event.request_id == request_id)
        mail = self._mail[request_id] = deque(own)
        others = [event for event in self._unread if event.request_id != request_id]
        self._unread = deque(others)
        return mail

    def _run_for(self, request_id: int) -> None:
        if request_id not in self._requests and request_id not in self._jobs:
            raise KelixError(f"request {request_id} is not running, so it has no more events")
        if not self._step():
            raise KelixError(f"request {request_id} is unfinished, but there is nothing to run")
