"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kelix_rt import __version__
from kelix_rt.errors import KelixError
from kelix_rt.reply import ReplyText
from kelix_rt.serve.chat import Completion
from kelix_rt.serve.errors import GoneError, UnknownModelError, error_body, failed, refused
from kelix_rt.serve.images import draw
from kelix_rt.serve.protocol import Body, ChatBody, ImageBody
from kelix_rt.serve.worker import EngineWorker

if TYPE_CHECKING:
    from kelix_rt.engine import Engine

Result = TypeVar("Result")


def create_app(engine: Engine, name: str, max_requests: int = 256) -> FastAPI:
    """An ASGI application over `engine`, which it owns from its start to its end.

    name: what the model is called in answers; a request that names another is refused.
    max_requests: unfinished requests taken at once; further ones get status 429. Raises ConfigError
    where the checkpoint has no tokenizer. An engine for strangers is made with allow_files=False.
    """
    text, config = engine.text, engine.config.qwen_config
    started = int(time.time())
    worker = EngineWorker(engine, max_requests)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.close()

    app = FastAPI(title="kelix_rt", version=__version__, lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503 and why not."""
        if worker.ended is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse(error_body(worker.ended, 503), 503)

    @app.get("/stats")
    async def stats() -> dict[str, int]:
        """Counts since the start: steps, blocks, pictures, hits of caches."""
        return asdict(await worker.stats())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model there is."""
        entry = {"id": name, "object": "model", "created": started, "owned_by": "kelix_rt"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """An answer to messages; pictures in them as base64 data: URLs."""
        _check_model(body, name)
        answer = Completion(worker, ReplyText(text, config), name, body)
        if not body.stream:
            return JSONResponse(await _while_connected(request, answer.whole()))
        first = await _while_connected(request, answer.first())
        return StreamingResponse(answer.chunks(first), media_type="text/event-stream")

    @app.post("/v1/images/generations", response_model=None)
    async def images(body: ImageBody, request: Request) -> Response:
        """Pictures of a description."""
        _check_model(body, name)
        return JSONResponse(await _while_connected(request, draw(worker, body)))

    app.add_exception_handler(KelixError, failed)
    app.add_exception_handler(Exception, failed)  # this one is logged too
    app.add_exception_handler(RequestValidationError, refused)
    return app


def _check_model(body: Body, name: str) -> None:
    if body.model not in (None, name):
        raise UnknownModelError(f"the model {body.model!r} is not served here, {name!r} is")


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError("the client went away")
        return await task
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
