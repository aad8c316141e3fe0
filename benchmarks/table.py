"""Markdown table of a results file: `python -m benchmarks.table benchmarks/results/FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def machine(results: dict[str, Any]) -> str:
    """One line: processor, cores, Python, commit."""
    info, commit = results["machine_info"], results["commit_info"]
    cpu = info["cpu"]
    name = cpu.get("brand_raw", info["processor"] or info["machine"])
    return (
        f"{name}, {cpu['count']} threads seen, Python {info['python_version']}, "
        f"commit {commit['id'][:7]}{' with local changes' if commit['dirty'] else ''}"
    )


def rows(results: dict[str, Any]) -> list[str]:
    """A line per benchmark: median, then what it was compared with in the same run."""
    lines = ["| benchmark | median ms | in the same run |", "|---|---|---|"]
    for entry in results["benchmarks"]:
        facts = ", ".join(f"{key} {value}" for key, value in entry["extra_info"].items())
        lines.append(f"| {entry['name']} | {entry['stats']['median'] * 1e3:.2f} | {facts} |")
    return lines


def main(path: str) -> None:
    """Print the table of one file."""
    results = json.loads(Path(path).read_text())
    print(machine(results), *rows(results), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
