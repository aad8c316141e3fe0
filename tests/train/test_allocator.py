"""Memory that a step frees is there for the next one, without a page fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kelix_rt.train import allocator

# What malloc does holds for the whole process, so each case has its own.
FAULTS = """
import resource
import torch
from kelix_rt.train.allocator import keep_freed_memory

kept = keep_freed_memory({most})

def step():
    tensors = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each, freed all at once

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(most: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(most=most)], capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    if kept != "True":
        pytest.skip("malloc is not glibc's")
    return int(count)


def test_pages_stay_with_the_process() -> None:
    assert 10 * faults(2**30) < faults(128 * 1024)


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
