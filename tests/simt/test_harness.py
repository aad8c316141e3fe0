"""The harness finds planted bugs: each case runs with and without its bug, under each schedule."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.simt.build import Build

SCHEDULES = range(8)

# What the bug must look like, and under how many of the eight schedules at least.
CAUGHT = {
    "reverse": ("wrong", 8),
    "rotate": ("wrong", 8),
    "copy": ("wrong", 4),  # only copies that land late show the missing wait
    "narrow_copy": ("wrong", 4),
    "gemm_wait": ("wrong", 4),
    "gemm_barrier": ("wrong", 2),  # only warps that run ahead show the missing barrier
    "hopper_full_wait": (r"wrong|more arrivals than|deadlock.*mbarrier.try_wait", 6),
    "hopper_empty_wait": (r"more arrivals than|deadlock.*mbarrier.try_wait", 8),
    "hopper_product_wait": ("wrong", 4),
    "hopper_bytes": (
        r"deadlock, waiting are thread 0 .*mbarrier.try_wait at .*\(hopper_gemm.cuh:\d+\)",
        8,
    ),
    "half_sums": (
        r"lanes of a warp meet in different calls.*half_sums_kernel \(planted.cuh:\d+\)",
        8,
    ),
    "split_barrier": (
        r"threads of a CTA meet in different calls.*split_barrier_kernel \(planted.cuh:\d+\)",
        8,
    ),
    "deadlock": (
        r"deadlock_kernel: deadlock.* in __shfl_xor_sync at .*deadlock_kernel \(planted.cuh:\d+\)"
        r"; thread \d+ of CTA 0 in __syncthreads at deadlock_kernel \(planted.cuh:\d+\)",
        8,
    ),
    "absent_lane": (r"reads lane \d+, which takes no part", 8),
    "masked_out": ("the mask leaves out the calling lane", 8),
    "grid_barrier": (r"deadlock, waiting are thread \d+ of CTA \d in __nanosleep", 8),
    "grid_rounds": ("wrong", 8),
    "shared_overrun": ("shared array `tile` was written past its end", 8),
    "block_size": ("a CTA must have 1 to 1024 threads, got 2048", 8),
}

# What only the sanitizers see, with the line they must name.
SANITIZED = {
    "shared_overrun": r"heap-buffer-overflow[\s\S]*shared_overrun_kernel.*planted.cuh:\d+",
    "global_overrun": r"heap-buffer-overflow[\s\S]*global_overrun_kernel.*planted.cuh:\d+",
    "misaligned": r"planted.cuh:\d+.*runtime error: .*misaligned address",
    "row_overrun": r"planted.cuh:\d+.*runtime error: index 32 out of bounds for type 'float",
}


def run(build: Build, case: str, variant: str, schedule: int) -> str:
    command = [str(build.proof), case, variant, str(schedule)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("case", CAUGHT)
def test_right_kernels_pass(simt: Build, case: str) -> None:
    assert [run(simt, case, "good", schedule) for schedule in SCHEDULES] == ["right"] * 8


@pytest.mark.parametrize("case", CAUGHT)
def test_planted_bugs_are_caught(simt: Build, case: str) -> None:
    pattern, at_least = CAUGHT[case]
    said = [run(simt, case, "bug", schedule) for schedule in SCHEDULES]
    caught = [bool(re.search(pattern, text)) for text in said]
    assert sum(caught) >= at_least, "\n".join(said)
    missed = [text for text, found in zip(said, caught, strict=True) if not found]
    assert set(missed) <= {"right"}, "\n".join(missed)


@pytest.mark.parametrize("case", [*CAUGHT, *SANITIZED])
def test_right_kernels_pass_sanitized(sanitized: Build, case: str) -> None:
    assert run(sanitized, case, "good", 7) == "right"


@pytest.mark.parametrize("case", SANITIZED)
def test_planted_bugs_are_caught_sanitized(sanitized: Build, case: str) -> None:
    for schedule in (0, 7):
        said = run(sanitized, case, "bug", schedule)
        assert re.search(SANITIZED[case], said), said


def test_a_schedule_repeats(simt: Build) -> None:
    """The same seed gives the same order, so that a failure can be looked at again."""
    first, second = (run(simt, "half_sums", "bug", 5) for _ in range(2))
    assert first == second
