"""`kelix bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kelix_rt.assets import BUNDLED, SCENE
from kelix_rt.cli import options
from kelix_rt.cli.output import plain_table, print_json, stdout
from kelix_rt.cli.session import load_engine
from kelix_rt.errors import InputError
from kelix_rt.request import GREEDY_DRAWING, RenderParams, SamplingParams

if TYPE_CHECKING:
    from kelix_rt.engine import Engine
    from kelix_rt.measure import Report, Workload

PROMPT = "draw a red circle left of a blue square on white."
QUESTION = "describe the picture."
GREEDY = SamplingParams(temperature=0.0, max_blocks=32)


def bench(
    model: options.Model = BUNDLED,
    config: Annotated[
        Literal["checkpoint", "release"],
        typer.Option("--config", help="release: random weights of the released size, on a GPU."),
    ] = "checkpoint",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the picture of the timeline goes.")
    ] = Path("timeline.png"),
    steps: options.Steps = 20,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs; the median counts.")] = 3,
    dit: options.Dit = None,
    vae: options.Vae = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    quantization: options.Quantization = None,
    as_json: options.Json = False,
) -> None:
    """Time the stages of a drawing and of an answer on this machine, one request at a time."""
    from kelix_rt.cli.timeline import draw_timeline
    from kelix_rt.measure import measure

    options.check_picture(out)
    render = RenderParams(steps=steps, seed=0)
    if config == "release":
        if model != BUNDLED or dit is not None or vae is not None:
            raise InputError(
                "--config release makes its own weights: drop --model, --dit and --vae"
            )
        from kelix_rt.config import EngineConfig
        from kelix_rt.release import release_engine, release_workload

        engine = release_engine(
            device, dtype, EngineConfig(kv_dtype=kv_dtype, quantization=quantization)
        )
        work = release_workload(engine, render)
    else:
        engine = load_engine(
            model,
            dit,
            vae,
            device,
            dtype,
            kv_dtype=kv_dtype,
            quantization=quantization,
            drawing=True,
        )
        work = workload(engine, render)
    report = measure(engine, work, runs)
    name = Path(model).name if config == "checkpoint" else "released size, random weights"
    where = place(engine)
    draw_timeline(report.traces, f"{name} on {where}").save(out)
    if as_json:
        print_json({"model": name, "device": where, "timeline": str(out), **as_facts(report)})
    else:
        show(report, f"{name} on {where}")
        stdout().print(f"timeline: {out}", markup=False)


def workload(engine: Engine, render: RenderParams) -> Workload:
    """A drawing, and a question about the picture that ships with the package."""
    from kelix_rt.measure import Workload
    from kelix_rt.request import Prompt

    pixels, grid = engine.images.preprocess(SCENE)
    parts = [{"type": "image", "image": SCENE}, {"type": "text", "text": QUESTION}]
    question = engine.chat_prompt([{"role": "user", "content": parts}])
    drawing = engine.drawing_prompt(PROMPT)
    assert isinstance(drawing, Prompt)
    return Workload(pixels, grid, question, GREEDY, drawing, GREEDY_DRAWING, render)


def place(engine: Engine) -> str:
    """Device, threads and dtype, for people."""
    import torch

    device, dtype = engine.runner.device, str(engine.runner.dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {dtype}"
    return f"{torch.get_num_threads()} CPU threads, {dtype}"


def show(report: Report, title: str) -> None:
    """The table."""
    table = plain_table("stage", "ms", "per second", "", title=title)
    table.columns[3].justify = "left"
    for row in report.rows:
        table.add_row(row.name, f"{row.seconds * 1e3:.2f}", f"{row.per_second:.4g}", row.unit)
    stdout().print(table)


def as_facts(report: Report) -> dict[str, object]:
    """Rows and traces for JSON."""
    rows = [{**asdict(row), "per_second": row.per_second} for row in report.rows]
    return {"rows": rows, "traces": [asdict(trace) for trace in report.traces]}
