"""Errors as OpenAI's API writes them."""

from __future__ import annotations

import logging

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kelix_rt.errors import AsleepError, CapacityError, ConfigError, InputError, KelixError
from kelix_rt.serve.worker import EndedError, OverloadedError


class UnknownModelError(KelixError):
    """A request names a model that is not served."""


class GoneError(KelixError):
    """The client went away before its answer."""


_log = logging.getLogger(__name__)
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (InputError, 400),
    (ConfigError, 400),
    (RecursionError, 400),  # lists in lists in lists ...
    (CapacityError, 400),  # of a request that could never run
    (UnknownModelError, 404),
    (OverloadedError, 429),
    (GoneError, 499),  # nginx' number; nobody reads it
    (AsleepError, 503),
    (EndedError, 503),
)


def error_response(error: Exception) -> JSONResponse:
    """What a client is told of an error."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    text = str(error) if status != 500 else f"{type(error).__name__}: {error}"
    return JSONResponse(error_body(text, status), status)


def error_body(message: str, status: int) -> dict[str, dict[str, str | None]]:
    """The body of an answer with this status."""
    kind = "invalid_request_error" if status < 429 else "server_error"
    message = message.encode("utf-8", "backslashreplace").decode()  # half a character of a client's
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def logged_response(error: Exception) -> JSONResponse:
    """The same; what is not the client's fault stands in the log."""
    response = error_response(error)
    if response.status_code == 500:
        _log.error("a request failed", exc_info=error)
    return response


async def failed(_: Request, error: Exception) -> JSONResponse:
    """Handles what a route raises on purpose."""
    return logged_response(error)


async def crashed(_: Request, error: Exception) -> JSONResponse:
    """Handles everything else, which the server logs itself."""
    return error_response(error)


async def declined(_: Request, error: Exception) -> JSONResponse:
    """Handles unknown routes, wrong methods and bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)


async def refused(_: Request, error: Exception) -> JSONResponse:
    """Handles a body of the wrong form."""
    assert isinstance(error, RequestValidationError)
    lines = [
        f"{'.'.join(str(part) for part in each['loc'][1:]) or 'body'}: {each['msg']}"
        for each in error.errors()
    ]
    return JSONResponse(error_body("; ".join(lines), 400), 400)
