"""Host work beside the loop: in order, forgotten when nobody wants it, its errors kept apart."""

from __future__ import annotations

from threading import Event, current_thread, main_thread

import pytest

from kelix_rt.jobs import Jobs


def drain(jobs: Jobs) -> list[object]:
    found = []
    while len(jobs):
        jobs.wait()
        job = jobs.pop_done()
        assert job is not None
        error = job.future.exception()
        found.append((job.request_id, repr(error) if error else job.future.result()))
    return found


@pytest.mark.parametrize("make", [Jobs.at_once, Jobs.on_a_thread])
def test_jobs_come_back_in_order_with_their_errors(make) -> None:
    jobs = make()
    jobs.start(1, lambda: "one", print)
    jobs.start(2, lambda: 1 // 0, print)
    jobs.start(3, lambda: "three", print)
    assert 2 in jobs and 4 not in jobs
    assert drain(jobs) == [
        (1, "one"),
        (2, "ZeroDivisionError('integer division or modulo by zero')"),
        (3, "three"),
    ]
    jobs.wait()  # for nothing
    assert jobs.pop_done() is None


def test_who_works() -> None:
    for jobs, inline in ((Jobs.at_once(), True), (Jobs.on_a_thread(), False)):
        jobs.start(1, current_thread, print)
        ((_, thread),) = drain(jobs)
        assert (thread is main_thread()) == inline


def test_a_cancelled_job_is_not_begun_or_has_no_result() -> None:
    jobs, hold, begun = Jobs.on_a_thread(), Event(), Event()
    ran = []

    def held() -> None:
        begun.set()
        hold.wait(60)

    jobs.start(1, held, print)
    jobs.start(2, lambda: ran.append(2), print)
    jobs.start(3, lambda: ran.append(3), print)
    assert begun.wait(60)
    assert jobs.pop_done() is None, "does not wait"
    jobs.cancel(1)
    jobs.cancel(2)
    assert 1 not in jobs and 2 not in jobs
    hold.set()
    assert drain(jobs) == [(3, None)]
    assert ran == [3]


def test_an_interrupt_is_raised_where_the_job_is_done() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    jobs = Jobs.at_once()
    with pytest.raises(KeyboardInterrupt):
        jobs.start(1, interrupted, print)
    assert len(jobs) == 0
