"""pytest plugin: the operator tests against the CUDA kernels, run on the CPU by the harness.

`pytest -p tests.simt.plugin --simt-library=build/simt/kelix_simt.so tests/ops` loads that operator
library in place of the package's, so that CPU tensors go through the CUDA launchers. A test with
one or two cases runs under all eight schedules; of others at most --simt-cases cases are kept,
spread over the grid, each under one schedule in turn.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

NUM_SCHEDULES = 8
ALL_SCHEDULES_UP_TO = 2  # cases of a test
# These judge the operator layer or the CPU kernels; no CUDA kernel runs in them.
NO_KERNEL = ("errors_name", "opcheck", "number_of_threads")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simt-library", help="kelix_simt.so as tests/simt/CMakeLists.txt builds it")
    parser.addoption("--simt-capability", type=int, default=90, help="of the GPU: 80, 90, ...")
    parser.addoption("--simt-cases", type=int, default=8, help="at most so many cases of a test")


def pytest_configure(config: pytest.Config) -> None:
    torch.ops.load_library(config.getoption("--simt-library"))
    library = ctypes.CDLL(config.getoption("--simt-library"))
    library.kelix_simt_use_capability(config.getoption("--simt-capability"))


@pytest.fixture(autouse=True, params=range(NUM_SCHEDULES), ids=lambda n: f"schedule{n}")
def simt_schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test's launches under one schedule."""
    library = ctypes.CDLL(request.config.getoption("--simt-library"))
    library.kelix_simt_use_schedule(request.param, ctypes.c_uint64(request.param + 1))
    yield


def schedule_of(item: pytest.Item) -> int:
    return item.callspec.params["simt_schedule"]  # type: ignore[attr-defined]


def chosen_of(cases: list[list[pytest.Item]], limit: int) -> list[pytest.Item]:
    """The items to run of one test; `cases` holds the eight items of each of its cases."""
    if len(cases) <= ALL_SCHEDULES_UP_TO:
        return [item for case in cases for item in case]
    count = min(limit, len(cases))
    spread = [cases[i * len(cases) // count] for i in range(count)]
    return [case[turn % NUM_SCHEDULES] for turn, case in enumerate(spread)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep CPU cases that run a kernel, each under its share of the schedules."""
    tests: dict[str, dict[str, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if item.get_closest_marker("gpu") or any(name in item.name for name in NO_KERNEL):
            continue
        case = item.nodeid.replace(f"schedule{schedule_of(item)}", "")
        tests[case.split("[")[0]][case].append(item)
    limit = config.getoption("--simt-cases")
    chosen = [item for cases in tests.values() for item in chosen_of([*cases.values()], limit)]
    dropped = set(items) - set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = chosen


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    library = ctypes.CDLL(config.getoption("--simt-library"))
    library.kelix_simt_launch_count.restype = ctypes.c_int64
    terminalreporter.write_line(f"kernel launches: {library.kelix_simt_launch_count()}")
