"""/v1/images/generations: a description to pictures."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from kelix_rt.errors import InputError
from kelix_rt.request import ImageDone, ImageOutput, RenderParams, SamplingParams
from kelix_rt.serve.protocol import ImageBody

if TYPE_CHECKING:
    from PIL.Image import Image

    from kelix_rt.engine import Engine
    from kelix_rt.serve.worker import EngineWorker


async def draw(worker: EngineWorker, body: ImageBody) -> dict[str, Any]:
    """The answer's body: n pictures, drawn side by side. When one cannot be drawn, none is.

    Raises InputError for impossible values of `body`, and what a request fails with.
    """
    if body.n > worker.limit:
        raise InputError(f"n must be at most {worker.limit} here, got {body.n}")
    wanted = [(body.sampling(index), body.render(index)) for index in range(body.n)]
    drawings = [asyncio.create_task(_draw_one(worker, body.prompt, *each)) for each in wanted]
    try:
        outputs = await asyncio.gather(*drawings)
    finally:
        for drawing in drawings:
            drawing.cancel()
    data = [
        {
            "b64_json": await asyncio.to_thread(_encoded, output.image, body.output_format),
            "seed": output.seed,
        }
        for output in outputs
    ]
    width, height = outputs[0].image.size
    return {
        "created": int(time.time()),
        "data": data,
        "size": f"{width}x{height}",
        "output_format": body.output_format,
    }


async def _draw_one(
    worker: EngineWorker, prompt: str, sampling: SamplingParams, render: RenderParams
) -> ImageOutput:
    picture = None
    async with aclosing(worker.events(partial(_add, prompt, sampling, render))) as events:
        async for event in events:
            if isinstance(event, ImageDone):
                picture = event.output
    assert picture is not None
    return picture


def _add(prompt: str, sampling: SamplingParams, render: RenderParams, engine: Engine) -> int:
    return engine.add_request(engine.drawing_prompt(prompt), sampling, render=render)


def _encoded(image: Image, form: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
