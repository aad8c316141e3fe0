"""One row of a comparison: our time, the peers' times in the same run, the ratio to the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kelix_rt.testing import copy_bandwidth, matrix_rate, median_seconds

Call = Callable[[], object]
Peers = Mapping[str, Call | str]  # a string says why a peer cannot run here


@dataclass
class Machine:
    """The device of a session, and what it can do at most as torch's own calls measure it."""

    device: str
    rows: dict[str, dict[str, object]] = field(default_factory=dict)  # printed at the end
    _matrix: dict[torch.dtype, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return self.device.startswith("cuda")

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second of a large copy."""
        return copy_bandwidth(self.device)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of a large square product."""
        if dtype not in self._matrix:
            self._matrix[dtype] = matrix_rate(dtype, self.device)
        return self._matrix[dtype]

    def seconds(self, call: Call, graph: bool, repeats: int) -> float:
        """Median time of a call; on a GPU with a cold L2 cache, and as a graph if asked for."""
        return median_seconds(call, self.device, repeats, graph)

    def best_seconds(self, calls: Mapping[str, Call], rounds: int = 2) -> dict[str, float]:
        """Shortest wall time of each call; they take turns, so that all meet the same machine.

        For calls of a second and more, which a few quiet moments cannot cover.
        """
        best = dict.fromkeys(calls, math.inf)
        for _ in range(rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if self.on_gpu:
                    torch.cuda.synchronize()
                best[name] = min(best[name], time.perf_counter() - begin)
        return best


@dataclass
class Comparison:
    """Times one call against others; a fixture makes one per benchmark."""

    benchmark: BenchmarkFixture
    machine: Machine

    def __call__(
        self,
        ours: Call,
        peers: Peers,
        floors: Mapping[str, Call] | None = None,
        *,
        num_bytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype = torch.float32,
        graph: bool = True,
        repeats: int = 5,
    ) -> dict[str, float]:
        """Times `ours` with pytest-benchmark and the others before and after it.

        floors: what no implementation can beat by much (reading the inputs once, the bare
        product). num_bytes, flops: the least that has to be moved and computed, for the shares of
        the machine's rates. graph: calls only launch work, so that on a GPU all can be captured;
        whole models wait for the device. repeats: of each of the others' two turns. Records the
        row; returns the ratios other / ours by name.
        """
        absent = {name: why for name, why in peers.items() if isinstance(why, str)}
        present = {name: call for name, call in peers.items() if not isinstance(call, str)}
        timed: dict[str, Call] = {**present, **(floors or {})}
        before = {name: self.machine.seconds(call, graph, repeats) for name, call in timed.items()}
        mine = self._time(ours, graph)
        # Other work on the machine only ever slows a call down: the better of two runs counts.
        theirs = {
            name: min(before[name], self.machine.seconds(call, graph, repeats))
            for name, call in timed.items()
        }
        facts: dict[str, object] = {"ms": round(mine * 1e3, 3)}
        if num_bytes is not None:
            share = num_bytes / mine / self.machine.copy_rate
            facts["copy_bandwidth_percent"] = round(100 * share, 1)
        if flops is not None:
            facts["matrix_rate_percent"] = round(
                100 * flops / mine / self.machine.matrix_rate(dtype), 1
            )
        for name, seconds in theirs.items():
            facts[f"{name}_ms"] = round(seconds * 1e3, 3)
            facts[f"{name}_ratio"] = round(seconds / mine, 2)
        facts |= absent
        if present:
            best = min(present, key=lambda name: theirs[name])
            facts |= {"best_peer": best, "ratio": round(theirs[best] / mine, 2)}
        self.record(facts)
        return {name: seconds / mine for name, seconds in theirs.items()}

    def _time(self, ours: Call, graph: bool) -> float:
        """Median seconds; pytest-benchmark keeps its own statistics of the same call."""
        if not self.machine.on_gpu:
            self.benchmark.pedantic(ours, rounds=9, warmup_rounds=2)
            return float(self.benchmark.stats.stats.median)

        def finished() -> None:
            ours()
            torch.cuda.synchronize()

        self.benchmark.pedantic(finished, rounds=9, warmup_rounds=2)
        return self.machine.seconds(ours, graph, repeats=9)

    def record(self, facts: Mapping[str, object]) -> None:
        """Adds to the row's facts in the results file, which the session prints at its end."""
        self.benchmark.extra_info |= dict(facts)
        self.machine.rows[self.benchmark.name] = self.benchmark.extra_info
