"""`kelix parity`: runs golden directories and shows every comparison."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kelix_rt.cli import options
from kelix_rt.cli.output import print_json, progress, stdout
from kelix_rt.config import KelixConfig, SanaConfig, TokenizerConfig, read_config
from kelix_rt.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

    from kelix_rt.parity.report import Check

FIXTURES = "fixtures.safetensors"


@dataclass(frozen=True)
class Report:
    """What one golden directory gave. kind: the module of kelix_rt.parity that ran it."""

    path: Path
    kind: str
    seconds: float
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Something was checked, and nothing missed."""
        return bool(self.checks) and all(check.ok for check in self.checks)


def run_parity(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A golden directory, or one that holds some.")
    ],
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    misses: Annotated[
        bool, typer.Option("--misses", help="Show only the rows that missed.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compare the runtime with golden outputs. Exit code 1 on a miss, or if nothing was checked."""
    import torch

    from kelix_rt.devices import choose_device, choose_dtype

    if not directory.is_dir():
        raise InputError(f"parity: {str(directory)!r} is not a directory")
    target, wanted = choose_device(device), choose_dtype(dtype)
    torch.backends.cudnn.allow_tf32 = False  # the golden outputs are float32 throughout
    reports = []
    with progress() as bar:
        found = list(find_golden(directory))
        task = bar.add_task("parity", total=len(found))
        for path in found:
            bar.update(task, description=str(path))
            reports.append(check_directory(path, target, wanted))
            bar.advance(task)
    ok = bool(reports) and all(report.ok for report in reports)
    if as_json:
        print_json(_as_json(reports, ok))
    else:
        for report in reports:
            _show(report, misses)
        _show_verdict(reports, ok, directory)
    raise typer.Exit(0 if ok else 1)


def find_golden(directory: Path) -> Iterator[Path]:
    """`directory` and what lies below it, where there are fixtures; in order."""
    if (directory / FIXTURES).is_file():
        yield directory
    for below in sorted(path for path in directory.iterdir() if path.is_dir()):
        yield from find_golden(below)


def kind_of(path: Path) -> str:
    """The module of kelix_rt.parity for a golden directory. ConfigError for an unknown layout."""
    if not (path / "config.json").exists():
        if (path / "dit").is_dir() and (path / "vae").is_dir():
            return "e2e"
        raise ConfigError("holds fixtures, but neither config.json nor dit/ and vae/")
    config = read_config(path)
    kinds = ((KelixConfig, "llm"), (TokenizerConfig, "tokenizer"), (SanaConfig, "dit"))
    return next((kind for cls, kind in kinds if isinstance(config, cls)), "vae")


def check_directory(path: Path, device: torch.device, dtype: torch.dtype | None) -> Report:
    """Runs one golden directory; a failure becomes a missed check, so that the others still run."""
    from kelix_rt.parity.report import Check

    start = time.perf_counter()
    kind = "?"
    try:
        kind = kind_of(path)
        checks = importlib.import_module(f"kelix_rt.parity.{kind}").run(path, device, dtype)
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        note = f"{type(error).__name__}: {message}"
        checks = [Check("run", float("inf"), 0.0, False, note)]
    return Report(path, kind, time.perf_counter() - start, checks)


def _show(report: Report, misses: bool) -> None:
    shown = [check for check in report.checks if not (misses and check.ok)]
    passed = sum(check.ok for check in report.checks)
    title = f"{report.path} ({report.kind}): {passed} of {len(report.checks)} checks passed, "
    console = stdout()
    console.print(title + f"{report.seconds:.1f} s", style="bold", markup=False)
    if not report.checks:
        console.print(
            "nothing was checked: no known fixture that this dtype can be compared with",
            style="red",
        )
    if not shown:
        return
    table = Table("check", box=None, pad_edge=False, padding=(0, 2))
    table.add_column("error", justify="right")
    table.add_column("tolerance", justify="right")
    table.add_column("verdict")
    table.add_column("note", overflow="fold")
    for check in shown:
        verdict = "[green]ok[/]" if check.ok else "[bold red]MISS[/]"
        name = check.name.replace("[", r"\[")
        note = check.note.replace("[", r"\[")
        table.add_row(name, f"{check.error:.3g}", f"{check.tolerance:.3g}", verdict, note)
    console.print(table)


def _show_verdict(reports: list[Report], ok: bool, directory: Path) -> None:
    if not reports:
        stdout().print(f"{directory}: no {FIXTURES} here or below", style="red", markup=False)
        return
    checks = [check for report in reports for check in report.checks]
    missed = sum(not check.ok for check in checks)
    empty = sum(not report.checks for report in reports)
    text = f"{len(checks)} checks in {len(reports)} directories, {missed} missed"
    if empty:
        text += f", {empty} directories without a check"
    stdout().print(text, style="green" if ok else "red")


def _as_json(reports: list[Report], ok: bool) -> dict[str, object]:
    directories = [
        {
            "path": str(report.path),
            "kind": report.kind,
            "ok": report.ok,
            "seconds": report.seconds,
            "checks": [asdict(check) for check in report.checks],
        }
        for report in reports
    ]
    return {"ok": ok, "directories": directories}
