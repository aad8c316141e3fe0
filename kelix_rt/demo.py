"""`python -m kelix_rt.demo --out out`: kelix-tiny looks at a picture and draws one, in seconds.

Runs on the checkpoint that ships with the package. It knows a small world of shapes, colours and
printed words; the picture it is shown here is of the test split, which it was not trained on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from kelix_rt import Engine, RenderParams, SamplingParams
from kelix_rt.assets import BUNDLED, SCENE
from kelix_rt.cli.generate import printable
from kelix_rt.cli.images import codes_table
from kelix_rt.cli.output import plain_table, print_error, stdout
from kelix_rt.errors import KelixError

QUESTIONS = (
    "how many objects are there?",
    "what color is the background?",
    "describe the picture.",
)
PROMPT = "draw a red circle left of a blue square on white."
SEED = 7
STEPS = 20
LAST_HUE = 212  # of 255; the circle of hues would lead back to the first one


@dataclass
class Stopwatch:
    """Seconds of the stages, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the body of a with statement as the stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run(out: Path, device: str) -> None:
    """Runs the demo, prints what happens and writes its images into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    console, watch = stdout(), Stopwatch()
    with watch.stage("load the models"):
        engine = Engine.from_pretrained(BUNDLED, device=device)

    with watch.stage("picture -> codes"):
        codes = engine.encode_image(SCENE)
    table = codes.codes.cpu().numpy()
    _, rows, columns = codes.grid
    console.print(f"{SCENE} became {len(table)} blocks of {table.shape[1]} codes:", markup=False)
    console.print(codes_table(table))
    books = engine.config.qwen_config.codes_per_book
    picture = code_picture(table, rows // 2, columns // 2, books)
    picture.save(out / "codes.png")
    console.print(f"as a picture, a square per block and a stripe per code: {out / 'codes.png'}\n")

    with watch.stage(f"picture and question -> text, {len(QUESTIONS)} times"):
        for question in QUESTIONS:
            content = [{"type": "image", "image": SCENE}, {"type": "text", "text": question}]
            message = {"role": "user", "content": content}
            answer = engine.chat([message], SamplingParams(temperature=0.0, max_blocks=64))
            console.print(f"Q: {question}\nA: {printable(answer.text)}", markup=False)

    render = RenderParams(steps=STEPS, seed=SEED)
    with watch.stage("prompt -> codes -> image"):
        drawing = engine.generate_image(PROMPT, render=render)
    drawing.image.save(out / "drawing.png")
    console.print(f"\n{PROMPT!r}: {len(drawing.blocks)} blocks, drawn to {out / 'drawing.png'}")

    with watch.stage("picture -> codes -> image"):
        again = engine.reconstruct(SCENE, render=render)
    again.image.save(out / "reconstruction.png")
    console.print(f"the picture drawn again from its codes: {out / 'reconstruction.png'}\n")

    timings = plain_table("stage", "seconds")
    for name, seconds in watch.seconds.items():
        timings.add_row(name, f"{seconds:.2f}")
    timings.add_row("  of the drawing: blocks", f"{drawing.timings.blocks:.2f}")
    timings.add_row(f"  of the drawing: {STEPS} denoise steps", f"{drawing.timings.render:.2f}")
    console.print(timings)


def code_picture(codes: np.ndarray, rows: int, columns: int, books: int) -> Image.Image:
    """Codes int64 [rows * columns, N] as colours: a square per block, a stripe per code.

    books: K, the number of codes a sub-codebook has; equal codes of a book get equal colours.
    """
    slots = codes.shape[1]
    hue = (codes * LAST_HUE // max(books - 1, 1)).astype(np.uint8).reshape(rows, columns * slots)
    bands = [
        Image.fromarray(band) for band in (hue, np.full_like(hue, 200), np.full_like(hue, 230))
    ]
    small = Image.merge("HSV", bands).convert("RGB")
    stripe = 6
    size = (columns * slots * stripe, rows * slots * stripe)
    return small.resize(size, Image.Resampling.NEAREST)


def main(args: list[str] | None = None) -> None:
    """The command line; exit code 2 and one line when the demo cannot run."""
    parser = argparse.ArgumentParser(prog="python -m kelix_rt.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the images go")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    chosen = parser.parse_args(args)
    try:
        run(chosen.out, chosen.device)
    except KelixError as error:
        print_error(error)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
