"""Prompts to rows, seeds and the rules that end a request."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kelix_rt.errors import InputError
from kelix_rt.intake import derive_seed, integer_array


def test_derived_seeds_are_positive_different_and_repeatable() -> None:
    seeds = [derive_seed(base, counter) for base in (-5, 0, 1, 1 << 62) for counter in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derive_seed(7, 3) == derive_seed(7, 3)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.1


@pytest.mark.parametrize(
    "value",
    [[1, 2], (1, 2), range(1, 3), np.array([1, 2], dtype=np.uint8), torch.tensor([1, 2]).int()],
)
def test_integers_come_in_many_containers(value: object) -> None:
    array = integer_array("ids", value)
    assert array.dtype == np.int64
    assert array.tolist() == [1, 2]


@pytest.mark.parametrize("value", [3, "12", None, [1.0], [[1], [1, 2]], [1 << 80], {"a": 1}])
def test_anything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(InputError, match="ids must be"):
        integer_array("ids", value)
