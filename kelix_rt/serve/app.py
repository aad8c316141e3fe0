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
from starlette.exceptions import HTTPException

from kelix_rt import __version__
from kelix_rt.errors import KelixError
from kelix_rt.reply import ReplyText
from kelix_rt.serve.chat import Completion
from kelix_rt.serve.errors import (
    GoneError,
    UnknownModelError,
    crashed,
    declined,
    error_body,
    failed,
    refused,
)
from kelix_rt.serve.images import draw
from kelix_rt.serve.protocol import ChatBody, ImageBody
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
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "kelix_rt"}
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
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The same, by its name."""
        _check_model(model, name)
        return entry

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """An answer to messages; pictures in them as base64 data: URLs."""
        _check_model(body.model, name)
        answer = Completion(worker, ReplyText(text, config), name, body)
        if not body.stream:
            return JSONResponse(await _while_connected(request, answer.whole()))
        first = await _while_connected(request, answer.first())
        return StreamingResponse(answer.chunks(first), media_type="text/event-stream")

    @app.post("/v1/images/generations", response_model=None)
    async def images(body: ImageBody, request: Request) -> Response:
        """Pictures of a description."""
        _check_model(body.model, name)
        return JSONResponse(await _while_connected(request, draw(worker, body)))

    app.add_exception_handler(KelixError, failed)
    app.add_exception_handler(Exception, crashed)
    app.add_exception_handler(RecursionError, failed)
    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(HTTPException, declined)
    return app


def _check_model(model: str | None, name: str) -> None:
    if model not in (None, name):
        raise UnknownModelError(f"the model {model!r} is not served here, {name!r} is")


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
