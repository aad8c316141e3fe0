"""Batches made in other processes are those made in this one, in order."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kelix_rt.train.ahead import Ahead, workers_for


def make(step: int) -> tuple[Tensor, int]:
    return torch.full((2,), step), os.getpid()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_any_first_step(workers: int) -> None:
    ahead = Ahead(make, 9, workers)
    for step in (3, 4, 5, 0, 1, 8):
        batch, process = ahead(step)
        assert batch.tolist() == [step, step]
        assert (process == os.getpid()) == (workers == 0)


def test_an_error_of_a_worker_arrives() -> None:
    def fail(step: int) -> Tensor:
        raise ValueError(f"no picture {step}")

    with pytest.raises(ValueError, match="no picture 2"):
        Ahead(fail, 4, 1)(2)


def test_a_cpu_gets_no_workers() -> None:
    assert workers_for("cpu") == 0
    assert workers_for("cuda") >= 1
