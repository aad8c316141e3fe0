"""What requests and answers look like: OpenAI's names, and Kelix' own where that has none.

A field that is not listed here is refused, not ignored, unless it is null. Values are checked where
they are used: by SamplingParams and RenderParams.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kelix_rt.errors import InputError
from kelix_rt.request import GREEDY_DRAWING, RenderParams, SamplingParams, Usage

LONGEST_SIDE = {"webp": 16383, "jpeg": 65500}


class Fields(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """Clients send what they leave open as null."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class Body(Fields):
    """A request's fields that every route takes. model: what /v1/models names; user: not used."""

    model: str | None = None
    user: str | None = None


class StreamOptions(Fields):
    """include_usage: send one more chunk, with the usage, behind the last."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(Fields):
    """The only form of an answer."""

    type: Literal["text"] = "text"


class ChatBody(Body):
    """POST /v1/chat/completions. max_tokens counts blocks; `chat_template_kwargs` go to the chat
    template. What is not given is SamplingParams' default. Of the fields behind it only the value
    that changes nothing is taken."""

    messages: list[dict[str, Any]]
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    stop: list[str] | None = Field(None, max_length=0)
    response_format: TextFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    def template_options(self) -> dict[str, Any] | None:
        """Raises InputError for a template of the request's own: it could compute for ever."""
        if self.chat_template_kwargs and "chat_template" in self.chat_template_kwargs:
            raise InputError("chat_template_kwargs: chat_template is the server's to choose")
        return self.chat_template_kwargs

    def turns(self) -> list[dict[str, Any]]:
        """The messages, with `developer`, the newer name of `system`, as that."""
        return [
            {**message, "role": "system"} if message.get("role") == "developer" else message
            for message in self.messages
        ]

    def sampling(self) -> SamplingParams:
        """Raises InputError for impossible values."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        longest = self.max_tokens
        if self.max_completion_tokens is not None:
            longest = self.max_completion_tokens
        return SamplingParams(**given, max_blocks=longest)


class ImageBody(Body):
    """POST /v1/images/generations. size: WIDTHxHEIGHT or auto, the size the DiT was trained for.
    steps, cfg, scheduler: of the DiT. temperature: of the blocks; 0 is greedy, as released. seed:
    picture i of n takes seed + i."""

    prompt: str
    n: int = Field(1, ge=1, le=16)
    size: str | None = None
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    seed: int | None = None
    steps: int = 50
    cfg: float = 1.0
    scheduler: Literal["euler", "dpm++"] = "euler"
    temperature: float = 0.0

    stream: Literal[False] = False
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"

    def render(self, index: int) -> RenderParams:
        """How picture `index` is drawn. Raises InputError for impossible values."""
        width, height = _size(self.size)
        longest = LONGEST_SIDE.get(self.output_format)
        if longest is not None and max(width or 0, height or 0) > longest:
            raise InputError(
                f"size: a side of a {self.output_format} has at most {longest} pixels, got "
                f"{self.size}"
            )
        seed = None if self.seed is None else self.seed + index
        return RenderParams(height, width, self.steps, self.cfg, 3.0, self.scheduler, seed)

    def sampling(self, index: int) -> SamplingParams:
        """How its blocks are drawn. Raises InputError for impossible values."""
        if self.temperature == 0:
            return GREEDY_DRAWING
        return SamplingParams(
            self.temperature, seed=None if self.seed is None else self.seed + index
        )


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None or text == "auto":
        return None, None
    width, _, height = text.partition("x")
    if not all(side.isascii() and side.isdigit() and len(side) < 7 for side in (width, height)):
        raise InputError(f"size must be WIDTHxHEIGHT in pixels or auto, got {text!r}")
    return int(width), int(height)


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`, counted in blocks."""
    return {
        "prompt_tokens": usage.prompt_blocks,
        "completion_tokens": usage.generated_blocks,
        "total_tokens": usage.prompt_blocks + usage.generated_blocks,
        "prompt_tokens_details": {"cached_tokens": usage.cached_blocks},
    }
