"""`kelix chat` and `kelix draw`."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kelix_rt.assets import BUNDLED
from kelix_rt.cli import options
from kelix_rt.cli.output import print_json, progress, stderr, stdout
from kelix_rt.cli.session import load_engine
from kelix_rt.request import (
    BlockEvent,
    Event,
    ImageDone,
    ImageOutput,
    ImageProgress,
    Output,
    RenderParams,
    RequestDone,
    RequestFailed,
    SamplingParams,
    TextDelta,
)

if TYPE_CHECKING:
    from kelix_rt.engine import Engine


def chat(
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    model: options.Model = BUNDLED,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="An image; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is off.")] = 50,
    top_p: Annotated[float, typer.Option("--top-p")] = 0.9,
    min_p: Annotated[float, typer.Option("--min-p")] = 0.0,
    max_blocks: Annotated[
        int | None, typer.Option("--max-blocks", help="Longest answer, in blocks.")
    ] = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    quantization: options.Quantization = None,
    as_json: options.Json = False,
) -> None:
    """Ask about text and images; the answer is printed as it is written."""
    sampling = SamplingParams(temperature, top_k, top_p, min_p, seed, max_blocks)
    messages = chat_messages(question, image or [], system)
    engine = load_engine(
        model,
        None,
        None,
        device,
        dtype,
        kv_dtype=kv_dtype,
        quantization=quantization,
        drawing=False,
    )
    output, text = _answer(engine, messages, sampling, show=not as_json)
    if as_json:
        print_json(
            {
                "text": text,
                "finish_reason": output.finish_reason,
                "usage": asdict(output.usage),
                "timings": asdict(output.timings),
            }
        )


def chat_messages(question: str, images: list[Path], system: str | None) -> list[dict[str, Any]]:
    """The conversation: the images, then the question, as one user turn.

    Raises InputError for an image that cannot be read, so before a model is loaded.
    """
    from kelix_rt.processing import load_image

    parts: list[dict[str, Any]] = [{"type": "image", "image": load_image(p)} for p in images]
    parts.append({"type": "text", "text": question})
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": parts}]


def _answer(
    engine: Engine, messages: list[dict[str, Any]], sampling: SamplingParams, *, show: bool
) -> tuple[Output, str]:
    pieces: list[str] = []
    output = None
    with progress() as bar:
        task = bar.add_task("reading", total=None)
        for event in engine.stream(messages, sampling):
            if isinstance(event, RequestFailed):
                raise event.error
            if isinstance(event, RequestDone):
                output = event.output
            elif isinstance(event, BlockEvent):
                bar.update(task, description="writing", advance=1)
            elif isinstance(event, TextDelta):
                pieces.append(event.text)
                if show:
                    bar.stop()  # from here on the text shows the progress
                    sys.stdout.write(printable(event.text))
                    sys.stdout.flush()
    assert output is not None
    if show:
        sys.stdout.write("\n")
        usage, seconds = output.usage, output.timings.total
        stderr().print(
            f"{usage.prompt_blocks} + {usage.generated_blocks} blocks in {seconds:.2f} s "
            f"(first after {output.timings.first_block:.2f} s), ended by {output.finish_reason}",
            style="dim",
        )
    return output, "".join(pieces)


def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def draw(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    model: options.Model = BUNDLED,
    out: options.Picture = Path("out.png"),
    steps: options.Steps = 50,
    cfg: options.Cfg = 1.0,
    seed: options.Seed = None,
    size: options.Size = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the blocks; 0 is greedy, as released.")
    ] = 0.0,
    dit: options.Dit = None,
    vae: options.Vae = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    quantization: options.Quantization = None,
    as_json: options.Json = False,
) -> None:
    """Draw an image of a description."""
    options.check_picture(out)
    width, height = options.read_size(size) or (None, None)
    render = RenderParams(height=height, width=width, steps=steps, cfg=cfg, seed=seed)
    sampling = SamplingParams(temperature, seed=seed) if temperature != 0 else None
    engine = load_engine(
        model, dit, vae, device, dtype, kv_dtype=kv_dtype, quantization=quantization, drawing=True
    )
    picture = follow_drawing(engine.stream(prompt, sampling, render=render))
    save_picture(picture, out, as_json)


def follow_drawing(events: Iterable[Event]) -> ImageOutput:
    """Shows the progress of a drawing request and returns its image; raises what it failed with."""
    picture = None
    with progress() as bar:
        task = bar.add_task("blocks", total=None)
        for event in events:
            if isinstance(event, RequestFailed):
                raise event.error
            if isinstance(event, BlockEvent):
                bar.update(task, completed=event.index + 1)
            elif isinstance(event, ImageProgress):
                bar.update(task, description="denoise", completed=event.step, total=event.steps)
            elif isinstance(event, ImageDone):
                picture = event.output
    assert picture is not None
    return picture


def save_picture(picture: ImageOutput, out: Path, as_json: bool) -> None:
    """Writes the image and says where it is, and what it was made of."""
    picture.image.save(out)
    width, height = picture.image.size
    facts = {
        "path": str(out),
        "width": width,
        "height": height,
        "blocks": len(picture.blocks),
        "condition_length": picture.condition_length,
        "seed": picture.seed,
        "timings": asdict(picture.timings),
    }
    if as_json:
        print_json(facts)
        return
    stdout().print(f"{out}: {width} x {height}, {len(picture.blocks)} blocks", markup=False)
    timings = picture.timings
    stderr().print(
        f"blocks {timings.blocks:.2f} s, denoising and decoding {timings.render:.2f} s, "
        f"noise seed {picture.seed}",
        style="dim",
    )
