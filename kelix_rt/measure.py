"""What `kelix bench` measures: the stages of a drawing and of an answer, step by step.

One request at a time through the engine as it serves; nothing is measured that a caller would not
wait for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kelix_rt.request import (
    BlockEvent,
    Event,
    ImageDone,
    ImageProgress,
    Prompt,
    RenderParams,
    RequestDone,
    RequestFailed,
    SamplingParams,
)
from kelix_rt.testing import median_seconds

if TYPE_CHECKING:
    from torch import Tensor

    from kelix_rt.engine import Engine

STAGES = ("encode", "prompt", "text block", "visual block", "denoise", "decode")


@dataclass(frozen=True)
class Span:
    """A stretch of a request's time, in seconds from its start. stage: one of STAGES."""

    stage: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """One request: a span per step of the engine, in order."""

    name: str
    spans: tuple[Span, ...]

    @property
    def total(self) -> float:
        """Seconds until the last step."""
        return self.spans[-1].end

    def seconds(self, stage: str) -> list[float]:
        """Lengths of the spans of a stage, in order."""
        return [span.seconds for span in self.spans if span.stage == stage]


@dataclass(frozen=True)
class Row:
    """One line of the table. count: what `seconds` covers that many of, for a rate per second."""

    name: str
    seconds: float
    count: int
    unit: str

    @property
    def per_second(self) -> float:
        """Units per second."""
        return self.count / self.seconds


@dataclass(frozen=True)
class Workload:
    """What is asked of an engine.

    pixels, grid: a picture for the vision tokenizer. question: a prompt with a picture in it.
    """

    pixels: Tensor
    grid: Tensor
    question: Prompt
    answering: SamplingParams
    drawing: Prompt
    sampling: SamplingParams
    render: RenderParams


@dataclass(frozen=True)
class Report:
    """The table, and the drawing and answer of median length."""

    rows: tuple[Row, ...]
    traces: tuple[Trace, ...]


def measure(engine: Engine, work: Workload, runs: int = 3) -> Report:
    """Medians over `runs` runs of each, after one that is not counted.

    Raises what a request fails with, InputError or ConfigError as the engine does.
    """
    stage = engine.runner.encode_stage()
    tokens = len(stage.codes(work.pixels, work.grid))
    encoding = median_seconds(lambda: stage.codes(work.pixels, work.grid).cpu(), repeats=runs)
    drawing = _median_trace(
        lambda: trace(engine, "prompt -> picture", work.drawing, work.sampling, work.render), runs
    )
    answer = _median_trace(
        lambda: trace(engine, "picture -> text", work.question, work.answering), runs
    )
    rows = [Row("picture -> codes", encoding, tokens, "tokens")]
    for name, stage_name, unit in (
        ("text block", "text block", "blocks"),
        ("visual block", "visual block", "blocks"),
        ("denoise step", "denoise", "steps"),
        ("latent -> pixels", "decode", "pictures"),
    ):
        steps = answer.seconds(stage_name) + drawing.seconds(stage_name)
        if steps:
            rows.append(Row(name, statistics.median(steps), 1, unit))
    rows.append(Row("prompt -> picture", drawing.total, 1, "pictures"))
    written = len(answer.seconds("text block")) + len(answer.seconds("visual block")) + 1
    rows.append(Row("picture -> text", answer.total, written, "blocks"))
    return Report(tuple(rows), (drawing, answer))


def trace(
    engine: Engine,
    name: str,
    prompt: Prompt,
    sampling: SamplingParams,
    render: RenderParams | None = None,
) -> Trace:
    """Runs one request alone and times every step. Raises what it fails with."""
    engine.scheduler.pool.reset_cache()  # a prompt that is there already would cost nothing,
    if engine.image_cache is not None:  # nor would the encoding of its picture
        engine.image_cache.clear()
    start = time.perf_counter()
    number = engine.add_request(prompt, sampling, render=render)
    spans: list[Span] = []
    first_code = engine.config.qwen_config.vocab_size
    now = 0.0
    while engine.has_work:
        encoding = bool(engine.scheduler.to_encode)
        events = [event for event in engine.step() if event.request_id == number]
        for event in events:
            if isinstance(event, RequestFailed):
                raise event.error
            if isinstance(event, ImageProgress) and engine.runner.device.type == "cuda":
                torch.cuda.synchronize(engine.runner.device)  # the step was only launched
        before, now = now, time.perf_counter() - start
        if events and all(isinstance(event, RequestDone) for event in events):
            continue
        spans.append(Span("encode" if encoding else _stage(events, first_code), before, now))
    return Trace(name, tuple(spans))


def _stage(events: list[Event], first_code: int) -> str:
    for event in events:
        if isinstance(event, ImageProgress):
            return "denoise"
        if isinstance(event, ImageDone):
            return "decode"
        if isinstance(event, BlockEvent):
            kind = "visual block" if event.ids[0] >= first_code else "text block"
            return kind if event.index else "prompt"
    return "prompt"  # a chunk of it, or the block that closes an image


def _median_trace(call: Callable[[], Trace], runs: int) -> Trace:
    call()
    ordered = sorted((call() for _ in range(runs)), key=lambda done: done.total)
    return ordered[len(ordered) // 2]
