"""An engine over golden checkpoints, and clients of a server over it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from kelix_rt import Engine
from kelix_rt.request import Event
from kelix_rt.serve.app import create_app
from tests.engine_helpers import assert_idle, load_engine

NAME = "tiny"


@pytest.fixture(scope="package")
def engine(golden: Path) -> Engine:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    return load_engine(golden / "llm" / "tiny_a", **parts, allow_files=False)


@pytest.fixture
def slow_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The same with 20 ms more to a step: 400 blocks take eight seconds."""
    step = engine.step

    def slow() -> list[Event]:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slow)
    return engine


def wait_until_idle(engine: Engine) -> None:
    """Until the server's engine has no work, seen from another thread; a minute at most."""
    deadline = time.monotonic() + 60
    while engine.has_work:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def client_of(engine: Engine, max_requests: int = 256) -> Iterator[httpx.Client]:
    """A client of a server on a port of this machine, which leaves nothing in its engine."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        app = create_app(engine, NAME, max_requests)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
    assert_idle(engine)


@pytest.fixture
def client(engine: Engine) -> Iterator[httpx.Client]:
    with client_of(engine) as client:
        yield client
