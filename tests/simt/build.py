"""Builds the SIMT harness and what runs on it, into build/ beside the other build directories."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Build:
    """Where the results of one build are."""

    directory: Path

    @property
    def library(self) -> Path:
        return self.directory / "kelix_simt.so"

    @property
    def proof(self) -> Path:
        return self.directory / "proof"


def build(sanitize: bool, target: str = "all") -> Build:
    """Configure and build with CMake; a later call compiles what changed."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.submodule_search_locations is not None
    directory = ROOT / "build" / ("simt-sanitized" if sanitize else "simt")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    configure = [
        *("cmake", "-S", str(Path(__file__).parent), "-B", str(directory), *generator),
        f"-DTORCH_DIR={torch.submodule_search_locations[0]}",
        f"-DSANITIZE={'ON' if sanitize else 'OFF'}",
    ]
    make = ["cmake", "--build", str(directory), "--target", target, "-j", str(os.cpu_count() or 2)]
    for command in (configure, make):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr}"
    return Build(directory)
