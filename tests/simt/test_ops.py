"""The operator tests again, with the CUDA kernels in place of the CPU's, run by the harness.

Every stem's tests run in a process of its own, which loads another operator library (plugin.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.simt.build import ROOT, Build


@dataclass(frozen=True)
class Stem:
    """A test file of tests/ops and its share of the test time."""

    name: str
    cases: int  # of each test at most, spread over its grid
    select: str = ""  # as for pytest -k: leaves out what is too large for the harness
    capability: int = 90  # of the GPU that the launchers choose their kernels for

    @property
    def id(self) -> str:
        return f"{self.name}-sm_{self.capability}"


STEMS = [
    Stem("sampling", 4, "not (distribution or every_key or depends_on_nothing or equal_logits)"),
    Stem("block_decoder", 4, "not independent_of_its_batch"),
    Stem("attention", 16),
    Stem("attention", 6, capability=86),  # decode with two stages
    Stem("attention_float8", 12),
    Stem("codes", 24),
    Stem("codes", 24, "not wide_rows and not embed", capability=80),
    Stem("diffusion", 24),
    Stem("linear", 24),
    Stem("norm", 36),
    Stem("activation", 15),
]
SANITIZED_STEMS = [
    Stem("sampling", 1, "ties or cannot_be_drawn"),
    Stem("block_decoder", 1, "equals_torch or parts_agree"),
    Stem("attention", 3),
    Stem("attention_float8", 3),
    Stem("codes", 3, "not wide_rows"),
    Stem("codes", 3, "not wide_rows and not embed", capability=80),
    Stem("diffusion", 6),
    Stem("linear", 6),
    Stem("norm", 6),
    Stem("activation", 3),
]


def run(build: Build, stem: Stem, preload: str) -> subprocess.CompletedProcess[str]:
    """The tests of one stem on the library of a build."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.simt.plugin", "-p", "no:cacheprovider"]
    command += [f"--simt-library={build.library}", f"--simt-cases={stem.cases}", "-x"]
    command += [f"--simt-capability={stem.capability}"]
    command += [f"tests/ops/test_{stem.name}.py"]
    command += ["-k", stem.select] if stem.select else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if preload:
        # Python itself leaks; the sanitizer must come before every other library.
        environment |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


Runs = dict[str, Future[subprocess.CompletedProcess[str]]]


def start(build: Build, stems: list[Stem], preload: str = "") -> Iterator[Runs]:
    """Starts the stems' processes, one per processor at a time; the tests wait for them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {stem.id: pool.submit(run, build, stem, preload) for stem in stems}


@pytest.fixture(scope="module")
def runs(simt: Build) -> Iterator[Runs]:
    yield from start(simt, STEMS)


@pytest.fixture(scope="module")
def sanitized_runs(sanitized: Build) -> Iterator[Runs]:
    files = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    yield from start(sanitized, SANITIZED_STEMS, " ".join(files))


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "kernel launches: 0" not in done.stdout, "the tests did not reach the CUDA launchers"


@pytest.mark.parametrize("stem", [stem.id for stem in STEMS])
def test_kernels_on_the_cpu(runs: Runs, stem: str) -> None:
    check(runs[stem].result())


@pytest.mark.parametrize("stem", [stem.id for stem in SANITIZED_STEMS])
def test_kernels_on_the_cpu_sanitized(sanitized_runs: Runs, stem: str) -> None:
    check(sanitized_runs[stem].result())
