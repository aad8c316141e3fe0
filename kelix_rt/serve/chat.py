"""/v1/chat/completions: a conversation, which may hold pictures, to text."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from kelix_rt.reply import ReplyText
from kelix_rt.request import BlockEvent, Event, RequestDone
from kelix_rt.serve.errors import logged_response
from kelix_rt.serve.protocol import ChatBody, usage_json

if TYPE_CHECKING:
    from kelix_rt.engine import Engine
    from kelix_rt.serve.worker import EngineWorker


class Completion:
    """One answer under way. Raises InputError for impossible values of `body`."""

    def __init__(self, worker: EngineWorker, reply: ReplyText, name: str, body: ChatBody) -> None:
        sampling, options, messages = body.sampling(), body.template_options(), body.turns()

        def add(engine: Engine) -> int:
            return engine.add_chat(messages, sampling, template_options=options)

        self._events = worker.events(add)
        self._reply = reply
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is sent at once."""
        text, output = "", None
        async with aclosing(self._events):
            async for event in self._events:
                text += self._text(event)
                if isinstance(event, RequestDone):
                    output = event.output
        assert output is not None
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": output.finish_reason}
        usage = usage_json(output.usage)
        return self._object("chat.completion", choices=[choice], usage=usage)

    async def first(self) -> Event:
        """The first event: by then it is clear that the messages can be answered."""
        return await anext(self._events)

    async def chunks(self, first: Event) -> AsyncIterator[str]:
        """Server-sent events: the text as it is written. An error on the way is the last of them,
        for the status has been sent by then."""
        yield self._chunk({"role": "assistant", "content": ""})
        async with aclosing(self._events):
            try:
                yield self._chunk_of(first)
                async for event in self._events:
                    yield self._chunk_of(event)
            except Exception as error:
                yield f"data: {bytes(logged_response(error).body).decode()}\n\n"
        yield "data: [DONE]\n\n"

    def _text(self, event: Event) -> str:
        if isinstance(event, BlockEvent):
            return self._reply.push(event.ids[0])
        return self._reply.finish() if isinstance(event, RequestDone) else ""

    def _chunk_of(self, event: Event) -> str:
        text = self._text(event)
        chunk = self._chunk({"content": text}) if text else ""
        if isinstance(event, RequestDone):
            chunk += self._chunk({}, event.output.finish_reason)
            if self._with_usage:
                usage = usage_json(event.output.usage)
                chunk += _line(self._object("chat.completion.chunk", choices=[], usage=usage))
        return chunk

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _line(self._object("chat.completion.chunk", choices=[choice]))

    def _object(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, **fields}


def _line(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
