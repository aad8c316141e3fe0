"""Shared by all benchmarks: the device, its threads and rates, mid-size checkpoints, the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.checkpoints import write_kelix
from benchmarks.compare import Comparison, Machine
from kelix_rt.train.allocator import keep_freed_memory

MACHINE = pytest.StashKey[Machine]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--threads: of torch, 2 by default so that results of different machines stay comparable."""
    parser.addoption("--threads", type=int, default=2, help="threads of the CPU benchmarks")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the device: a GPU where there is one.

    Freed memory is kept, for both sides: peers that make large tensors would else be timed at
    getting them from the system anew in every call.
    """
    keep_freed_memory()
    torch.set_num_threads(config.getoption("--threads"))
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in the peers' convolutions too
    config.stash[MACHINE] = Machine("cuda" if torch.cuda.is_available() else "cpu")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The rows of the session, which pytest would show for failing benchmarks only."""
    for name, facts in config.stash[MACHINE].rows.items():
        text = ", ".join(f"{fact} {value}" for fact, value in facts.items())
        terminalreporter.write_line(f"{name}: {text}")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """The device and its rates."""
    return request.config.stash[MACHINE]


@pytest.fixture(scope="session")
def device(machine: Machine) -> str:
    """Name of the device."""
    return machine.device


@pytest.fixture
def compare(benchmark: BenchmarkFixture, machine: Machine) -> Comparison:
    """Times a call against its peers."""
    return Comparison(benchmark, machine)


@pytest.fixture(scope="session")
def mid_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Kelix of about 500 MB in float32, with dit/ and vae/."""
    return write_kelix(tmp_path_factory.mktemp("checkpoints") / "mid_size")
