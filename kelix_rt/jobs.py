"""Host work of requests that needs no step: pictures read and resized, pixels made a picture.

On a GPU one thread does it while steps go on; jobs are done in the order they came. Without the
thread a job is done at once, where it would only take cores from the model. No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


class InlineExecutor(Executor):
    """Does the work in `submit`; an error is the future's, an interrupt is raised."""

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """The result, already there."""
        future: Future[Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Job:
    """Work of one request. then: what the loop does with the result."""

    request_id: int
    future: Future[Any]
    then: Callable[[Any], object]


class Jobs:
    """The jobs of one loop, whose thread calls all methods."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._jobs: deque[Job] = deque()

    @classmethod
    def on_a_thread(cls) -> Jobs:
        """Jobs next to the loop; the thread starts with the first one."""
        return cls(ThreadPoolExecutor(max_workers=1, thread_name_prefix="kelix-jobs"))

    @classmethod
    def at_once(cls) -> Jobs:
        """Jobs that are done where they are started."""
        return cls(InlineExecutor())

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: int) -> bool:
        return any(job.request_id == request_id for job in self._jobs)

    def start(
        self, request_id: int, work: Callable[[], Result], then: Callable[[Result], object]
    ) -> None:
        """Queues work; it must touch nothing that the loop changes."""
        self._jobs.append(Job(request_id, self._executor.submit(work), then))

    def cancel(self, request_id: int) -> None:
        """Forgets the jobs of a request: not begun if they have not, else without a result."""
        kept: deque[Job] = deque()
        for job in self._jobs:
            if job.request_id == request_id:
                job.future.cancel()
            else:
                kept.append(job)
        self._jobs = kept

    def pop_done(self) -> Job | None:
        """The next job if it is done. Does not wait."""
        if self._jobs and self._jobs[0].future.done():
            return self._jobs.popleft()
        return None

    def wait(self) -> None:
        """Until the next job is done, well or not."""
        if self._jobs:
            self._jobs[0].future.exception()
