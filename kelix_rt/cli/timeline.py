"""Draws traces as a picture: a lane per request, its steps over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from kelix_rt.measure import STAGES, Trace

COLOURS = dict(
    zip(STAGES, ("#b8860b", "#8a8f98", "#7fb0de", "#2f6fb2", "#3f9b5f", "#b5533c"), strict=True)
)
LABELS = {
    "encode": "picture -> codes",
    "prompt": "prompt",
    "text block": "text block",
    "visual block": "visual block",
    "denoise": "denoise step",
    "decode": "latent -> pixels",
}
WIDTH, MARGIN, TITLE, LANE, BAR = 1200, 24, 40, 84, 36
GAP_FROM = 4  # pixels from which on steps are drawn with a gap between them


def draw_timeline(traces: Sequence[Trace], title: str) -> Image.Image:
    """The picture; all lanes share one time axis that ends with the longest trace."""
    height = 2 * MARGIN + TITLE + LANE * len(traces) + 60
    image = Image.new("RGB", (WIDTH, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    longest = max(trace.total for trace in traces)
    scale = (WIDTH - 2 * MARGIN) / longest
    pen.text((MARGIN, MARGIN), title, fill="black", font=font)
    for number, trace in enumerate(traces):
        _draw_lane(pen, font, trace, MARGIN + TITLE + LANE * number, scale)
    _draw_axis(pen, font, longest, scale, MARGIN + TITLE + LANE * len(traces))
    return image


def _draw_lane(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    trace: Trace,
    top: int,
    scale: float,
) -> None:
    pen.text((MARGIN, top), f"{trace.name}: {_time(trace.total)}", fill="black", font=font)
    bar = top + 24
    for span in trace.spans:
        left, right = (MARGIN + scale * second for second in (span.start, span.end))
        gap = 1 if right - left >= GAP_FROM else 0
        pen.rectangle((left, bar, max(left, right - gap), bar + BAR), fill=COLOURS[span.stage])


def _draw_axis(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    longest: float,
    scale: float,
    top: int,
) -> None:
    step = _tick(longest)
    for number in range(int(longest / step) + 1):
        x = MARGIN + scale * number * step
        pen.line((x, top, x, top + 6), fill="black")
        pen.text((x, top + 8), _time(number * step), fill="black", font=font)
    x = MARGIN
    for stage, label in LABELS.items():
        pen.rectangle((x, top + 38, x + 14, top + 52), fill=COLOURS[stage])
        pen.text((x + 20, top + 35), label, fill="black", font=font)
        x += 180


def _tick(longest: float) -> float:
    """A round step that gives between four and ten ticks."""
    power = 10.0 ** math.floor(math.log10(longest))
    return next(power * part for part in (0.1, 0.2, 0.5, 1.0) if longest / (power * part) <= 10)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
