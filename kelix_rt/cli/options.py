"""Options that several commands share, and the readers of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kelix_rt.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Model = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint directory, hub id, or kelix-tiny.")
]
Dit = Annotated[
    str | None, typer.Option("--dit", help="Image DiT; default: dit/ of the model where it exists.")
]
Vae = Annotated[
    str | None, typer.Option("--vae", help="Autoencoder of the DiT; default: vae/ of the model.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto (as stored), bfloat16, float16 or float32.")
]
KvDtype = Annotated[
    Literal["auto", "fp8"],
    typer.Option("--kv-dtype", help="Of the KV cache: auto is --dtype, fp8 half of bfloat16."),
]
Quantization = Annotated[
    Literal["int8"] | None,
    typer.Option("--quantization", help="int8: the language model's matrices in a byte a weight."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes a run repeatable.")]
Steps = Annotated[int, typer.Option("--steps", help="Denoise steps.")]
Cfg = Annotated[float, typer.Option("--cfg", help="Guidance; 1 is none.")]
Size = Annotated[
    str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels, or one number for a square.")
]
Picture = Annotated[Path, typer.Option("--out", "-o", help="Where the image goes.")]


def read_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of `WIDTHxHEIGHT` or `SIDE`. Raises InputError for anything else."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InputError(f"--size must be WIDTHxHEIGHT or one number of pixels, got {text!r}")
    numbers = [int(side) for side in sides]
    return numbers[0], numbers[-1]


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises InputError before any work when `path` cannot be written to."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"--out must end in {' or '.join(suffixes)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise InputError(f"--out: there is no directory {str(path.parent)!r}")
    if path.is_dir():
        raise InputError(f"--out: {str(path)!r} is a directory")


def check_picture(path: Path) -> None:
    """`check_output` for an image."""
    check_output(path, PICTURES)
