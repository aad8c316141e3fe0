"""What the commands print: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def stdout() -> Console:
    """A console for results; made per call, so that redirected streams are followed."""
    return Console(file=sys.stdout, soft_wrap=True, highlight=False)


def stderr() -> Console:
    """A console for progress and errors."""
    return Console(file=sys.stderr, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout; NaN and infinity become null, as JSON has neither."""
    plain = (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8")
    sys.stdout.write(json.dumps(_finite(value), ensure_ascii=plain) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_error(error: Exception) -> None:
    """One line on stderr."""
    text = " ".join(str(error).split()) or type(error).__name__
    stderr().print(f"error: {text}", style="red", markup=False)


def progress() -> Progress:
    """Bars that count steps; they vanish when they are done and are silent off a terminal."""
    return _bars(MofNCompleteColumn())


def byte_progress() -> Progress:
    """Bars that count bytes."""
    return _bars(DownloadColumn(binary_units=True))


def _bars(counter: MofNCompleteColumn | DownloadColumn) -> Progress:
    console = stderr()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        counter,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def size_text(num_bytes: int) -> str:
    """Bytes for people: `16.4 MiB`."""
    power = min(int(math.log(max(num_bytes, 1), 1024)), len(UNITS) - 1)
    if power == 0:
        return f"{num_bytes} B"
    return f"{num_bytes / 1024**power:.1f} {UNITS[power]}"


def plain_table(*columns: str, title: str | None = None) -> Table:
    """A table whose first column is text and whose other columns are set right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table
