"""Assembles the commands and turns expected errors into one line and exit code 2."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kelix_rt import __version__
from kelix_rt.cli import bench, generate, images, inspection, parity, serve
from kelix_rt.cli.output import print_error
from kelix_rt.errors import KelixError

app = typer.Typer(
    name="kelix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate.chat)
app.command()(generate.draw)
app.command()(images.encode)
app.command()(images.reconstruct)
app.command()(serve.serve)
app.command()(inspection.info)
app.command()(bench.bench)
app.command("parity")(parity.run_parity)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kelix_rt {__version__}")
        raise typer.Exit


@app.callback()
def kelix(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run Kelix: images and text in, text and images out."""


def run(args: Sequence[str] | None) -> None:
    """`kelix_rt.cli.main`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no answer is lost to a terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=None if args is None else list(args), prog_name="kelix")
    except (KelixError, OSError) as error:  # the disk is full, a file cannot be written, ...
        print_error(error)
        raise SystemExit(2) from None
