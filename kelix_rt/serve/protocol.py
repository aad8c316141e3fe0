"""What requests and answers look like: OpenAI's names, and Kelix' own where that has none.

A field that is not listed here is refused, not ignored, unless it is null. Values are checked where
they are used: by SamplingParams and RenderParams.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kelix_rt.errors import InputError
from kelix_rt.request import GREEDY_DRAWING, RenderParams, SamplingParams, Usage


class Body(BaseModel):
    """A request's fields that every route takes. model: what /v1/models names; user: not used."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """Clients send what they leave open as null."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(BaseModel):
    """include_usage: send one more chunk, with the usage, behind the last."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ChatBody(Body):
    """POST /v1/chat/completions. max_tokens counts blocks; `chat_template_kwargs` go to the chat
    template. What is not given is SamplingParams' default. Of n, logprobs and the penalties only
    the value that changes nothing is taken."""

    messages: list[dict[str, Any]]
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None

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

    def render(self, index: int) -> RenderParams:
        """How picture `index` is drawn. Raises InputError for impossible values."""
        width, height = _size(self.size)
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
