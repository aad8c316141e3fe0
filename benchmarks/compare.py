"""One row of a comparison: our time, the peers' times in the same run, the ratio to the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pytest_benchmark.fixture import BenchmarkFixture

from kelix_rt.testing import median_seconds

MAX_SECONDS = 2.0


def against_peers(
    benchmark: BenchmarkFixture,
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    floors: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Times `ours` with pytest-benchmark and the others around it; prints and records the row.

    floors: what no implementation can beat by much (reading the inputs once, the bare product).
    Returns the ratios peer / ours and floor / ours by name.
    """
    timed = {**peers, **(floors or {})}
    before = {name: median_seconds(call, repeats=5) for name, call in timed.items()}
    benchmark.pedantic(ours, rounds=9, warmup_rounds=2)
    after = {name: median_seconds(call, repeats=5) for name, call in timed.items()}
    mine = benchmark.stats.stats.median
    # Other work on the machine only ever slows a call down: the better of two runs counts.
    theirs = {name: min(before[name], after[name]) for name in timed}
    benchmark.extra_info["ms"] = round(mine * 1e3, 3)
    for name, seconds in theirs.items():
        benchmark.extra_info[f"{name}_ms"] = round(seconds * 1e3, 3)
        benchmark.extra_info[f"{name}_ratio"] = round(seconds / mine, 2)
    row = ", ".join(f"{n} {s * 1e3:.2f} ms ({s / mine:.2f}x)" for n, s in theirs.items())
    print(f"\n{benchmark.name}: {mine * 1e3:.2f} ms; {row}")
    return {name: seconds / mine for name, seconds in theirs.items()}
