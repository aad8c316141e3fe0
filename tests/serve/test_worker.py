"""The worker: one thread inside the engine, and an end that leaves nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kelix_rt import Engine, RequestDone, SamplingParams
from kelix_rt.request import Event
from kelix_rt.serve.worker import EndedError, EngineWorker, OverloadedError
from tests.engine_helpers import assert_idle

SAMPLING = SamplingParams(0.0, max_blocks=20, ignore_eos=True)


@asynccontextmanager
async def working(engine: Engine, limit: int = 8) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(engine, limit)
    worker.start()
    try:
        yield worker
    finally:
        await worker.close()


def ask(worker: EngineWorker) -> AsyncGenerator[Event, None]:
    return worker.events(lambda engine: engine.add_request([1, 2, 3], SAMPLING))


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


def test_leaving_early_aborts(engine: Engine) -> None:
    async def run() -> None:
        async with working(engine, limit=1) as worker:
            for _ in range(3):  # each takes the only place
                events = ask(worker)
                await anext(events)
                with pytest.raises(OverloadedError, match="1 requests are unfinished"):
                    await anext(ask(worker))
                await events.aclose()

    asyncio.run(run())
    assert_idle(engine)


def test_what_add_raises_is_raised(engine: Engine) -> None:
    async def run() -> None:
        async with working(engine) as worker:
            with pytest.raises(ZeroDivisionError):
                await anext(worker.events(lambda _: 1 // 0))
            assert len(await _all(ask(worker))) == 21

    asyncio.run(run())


def test_closing_ends_what_is_unfinished(engine: Engine) -> None:
    async def run() -> None:
        async with working(engine) as worker:
            events = ask(worker)
            await anext(events)
            await worker.close()
            with pytest.raises(EndedError, match="shutting down"):
                await _all(events)
            with pytest.raises(EndedError, match="shutting down"):
                await worker.stats()
            assert worker.ended == "the server is shutting down"

    asyncio.run(run())
    assert_idle(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_leaves_nobody_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> list[Event]:
        raise RuntimeError("broken")

    async def run() -> None:
        async with working(engine) as worker:
            events = ask(worker)
            await anext(events)
            with monkeypatch.context() as patch:
                patch.setattr(engine, "step", failing)
                with pytest.raises(EndedError, match=r"has failed: RuntimeError\('broken'\)"):
                    await _all(events)
            with pytest.raises(EndedError, match="has failed"):
                await anext(ask(worker))

    asyncio.run(run())
    while engine.has_work:
        engine.step()
