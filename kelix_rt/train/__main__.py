"""`python -m kelix_rt.train`: train kelix-tiny part by part or as a whole, and measure it."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kelix_rt.devices import choose_device
from kelix_rt.errors import ConfigError, KelixError
from kelix_rt.train.ablations import show as show_ablations
from kelix_rt.train.allocator import keep_freed_memory
from kelix_rt.train.evaluate import Amounts, show
from kelix_rt.train.jobs import JOBS, run_jobs
from kelix_rt.train.pipeline import STAGES, Pipeline, evaluate_checkpoint
from kelix_rt.train.recipe import CPU, GPU

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of checkpoints and logs.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')]
Budget = Annotated[
    float, typer.Option(min=0.0, help="Share of the recipe's steps, to try things out.")
]
Seed = Annotated[int, typer.Option(help="Seed of weights, pictures and batches.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")]
Stages = Annotated[
    list[str] | None, typer.Option("--stage", help="Stages to train, in order; all when not given.")
]
OUT = Path("out/kelix-tiny")
SEED_LIMIT = 1 << 40  # every step has a seed of its own, a million times as large
WHAT = {"language": "language model", "detokenizer": "DiT"}

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def pipeline(out: Path, device: str, budget: float, seed: int, threads: int) -> Pipeline:
    """The run that the options describe: the recipe of the device, scaled."""
    if not math.isfinite(budget) or abs(seed) >= SEED_LIMIT:
        raise ConfigError(
            f"train: --budget must be finite and --seed below 2^40, got {budget} and {seed}"
        )
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    target = choose_device(device)
    if target.type == "cuda":
        torch.set_float32_matmul_precision("high")
    recipe = GPU if target.type == "cuda" else CPU
    return Pipeline(recipe.scaled(budget).seeded(seed), out, target)


def _trainer(part: str) -> None:
    def command(
        stage: Stages = None,
        out: Out = OUT,
        device: Device = "auto",
        budget: Budget = 1.0,
        seed: Seed = 0,
        threads: Threads = 0,
    ) -> None:
        unknown = sorted(set(stage or ()) - set(STAGES[part]))
        if unknown:
            raise ConfigError(f"--stage of {part} must be one of {', '.join(STAGES[part])}, "
                              f"got {', '.join(unknown)}")  # fmt: skip
        pipeline(out, device, budget, seed, threads).train(part, stage)

    command.__doc__ = f"Train the {WHAT.get(part, part)}: stages {', '.join(STAGES[part])}."
    app.command(part)(command)


for _part in STAGES:
    _trainer(_part)


@app.command()
def export(
    out: Out = OUT,
    device: Device = "auto",
    budget: Budget = 1.0,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Write the trained parts as one checkpoint in the released layout."""
    run = pipeline(out, device, budget, seed, threads)
    size = run.export()
    Console().print(f"{run.checkpoint}: {size / 1e6:.1f} MB")


@app.command("all")
def everything(
    out: Out = OUT,
    device: Device = "auto",
    budget: Budget = 1.0,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Train every part, export and evaluate. Resumes where it was interrupted.

    On a CPU of two or more threads parts that do not need each other run beside each other.
    """
    run = pipeline(out, device, budget, seed, threads)
    if run.device.type == "cpu" and torch.get_num_threads() > 1:
        options = ("--out", str(out), "--device", "cpu", "--budget", str(budget))
        run.write_text()  # two of the first jobs read it
        run_jobs(JOBS, (*options, "--seed", str(seed)), torch.get_num_threads())
    else:
        run.train_all()
    size = run.export()
    Console().print(f"{run.checkpoint}: {size / 1e6:.1f} MB")
    show(run.evaluate(Amounts(seed=seed).scaled(budget)), Console())


@app.command("ablate")
def ablations(
    out: Out = OUT,
    device: Device = "auto",
    budget: Budget = 1.0,
    seed: Seed = 0,
    threads: Threads = 0,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of the val split.")] = 200,
) -> None:
    """Train small variants of the tokenizer (N, fusion, shared codebook) and compare them."""
    found = pipeline(out, device, budget, seed, threads).ablate(pictures)
    show_ablations(found, Console())


@app.command()
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="A finished checkpoint, or kelix-tiny: the bundled one.")
    ] = str(OUT / "kelix-tiny"),
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where tables and the contact sheet go.")
    ] = Path("out/evaluation"),
    device: Device = "auto",
    amount: Annotated[float, typer.Option(min=0.0, help="Share of the test samples.")] = 1.0,
    guidance: Annotated[float, typer.Option(min=0.0, help="Of the DiT; 1 is none.")] = 1.0,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Measure a checkpoint on the test split: a table, evaluation.json and a contact sheet."""
    if threads:
        torch.set_num_threads(threads)
    amounts = Amounts(cfg=guidance, seed=seed).scaled(amount)
    show(evaluate_checkpoint(checkpoint, out, amounts, choose_device(device)), Console())


def main() -> None:
    """Runs the command; errors made on purpose and those of the disk are one line and exit code 1.

    Being told to end stops what it started, too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except (KelixError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
