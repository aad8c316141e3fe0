"""The worker: one thread inside the engine, and an end that leaves nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from kelix_rt import Engine, RequestDone, SamplingParams
from kelix_rt.request import Event
from kelix_rt.serve.worker import EndedError, EngineWorker, OverloadedError
from tests.engine_helpers import assert_idle
from tests.serve.conftest import wait_until_idle

SAMPLING = SamplingParams(0.0, max_blocks=20, ignore_eos=True)
LONG = SamplingParams(0.0, max_blocks=400, ignore_eos=True)


@asynccontextmanager
async def working(engine: Engine, limit: int = 8) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(engine, limit)
    worker.start()
    try:
        yield worker
    finally:
        await worker.close()


def ask(worker: EngineWorker, how: SamplingParams = SAMPLING) -> AsyncGenerator[Event, None]:
    return worker.events(lambda engine: engine.add_request([1, 2, 3], how))


def test_events_are_those_of_the_request(engine: Engine) -> None:
    async def run() -> list[list[Event]]:
        async with working(engine) as worker:
            both = [ask(worker), ask(worker)]
            return await asyncio.gather(*(_all(events) for events in both))

    expected = engine.generate([[1, 2, 3]], SAMPLING)[0].blocks.tolist()
    for events in asyncio.run(run()):
        done = events[-1]
        assert isinstance(done, RequestDone)
        assert done.output.blocks.tolist() == expected
        assert len(events) == len(expected) + 1
    assert_idle(engine)


async def _all(events: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in events]


def test_leaving_early_aborts(slow_engine: Engine) -> None:
    before = slow_engine.stats().blocks

    async def run() -> None:
        async with working(slow_engine, limit=1) as worker:
            for _ in range(3):  # each takes the only place
                events = ask(worker, LONG)
                await anext(events)
                with pytest.raises(OverloadedError, match="1 requests are unfinished"):
                    await anext(ask(worker))
                await events.aclose()
            await asyncio.to_thread(wait_until_idle, slow_engine)

    asyncio.run(run())
    assert slow_engine.stats().blocks - before < 400
    assert_idle(slow_engine)


def test_an_answer_that_nobody_reads_takes_no_place(engine: Engine) -> None:
    async def run() -> None:
        async with working(engine, limit=1) as worker:
            unread = ask(worker)
            await anext(unread)
            await asyncio.to_thread(wait_until_idle, engine)
            while True:
                with suppress(OverloadedError):
                    assert len(await _all(ask(worker))) == 21
                    break
            assert len(await _all(unread)) == 20

    asyncio.run(run())


def test_before_its_start_it_takes_nothing(engine: Engine) -> None:
    async def run() -> None:
        with pytest.raises(EndedError, match="has not been started"):
            await anext(ask(EngineWorker(engine, 1)))

    asyncio.run(run())


def test_what_add_raises_is_raised(engine: Engine) -> None:
    async def run() -> None:
        async with working(engine) as worker:
            with pytest.raises(ZeroDivisionError):
                await anext(worker.events(lambda _: 1 // 0))
            assert len(await _all(ask(worker))) == 21

    asyncio.run(run())


def test_closing_ends_what_is_unfinished(slow_engine: Engine) -> None:
    async def run() -> None:
        async with working(slow_engine) as worker:
            events = ask(worker, LONG)
            await anext(events)
            await worker.close()
            with pytest.raises(EndedError, match="shutting down"):
                await _all(events)
            with pytest.raises(EndedError, match="shutting down"):
                await worker.stats()
            assert worker.ended == "the server is shutting down"

    asyncio.run(run())
    assert_idle(slow_engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_leaves_nobody_waiting(
    slow_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> list[Event]:
        raise RuntimeError("broken")

    async def run() -> None:
        async with working(slow_engine) as worker:
            events = ask(worker, LONG)
            await anext(events)
            with monkeypatch.context() as patch:
                patch.setattr(slow_engine, "step", failing)
                with pytest.raises(EndedError, match=r"has failed: RuntimeError\('broken'\)"):
                    await _all(events)
            with pytest.raises(EndedError, match="has failed"):
                await anext(ask(worker))

    asyncio.run(run())
    slow_engine.discard(list(slow_engine._requests))
    assert_idle(slow_engine)
