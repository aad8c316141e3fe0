"""Sampling values per slot, and defaults that other parts rely on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kelix_rt.errors import InputError
from kelix_rt.request import GREEDY_DRAWING, RenderParams, SamplingParams, SlotSampling


def test_table_repeats_the_values_for_every_slot() -> None:
    table = SamplingParams(0.5, 7, 0.8, 0.1).table(5)
    assert table.shape == (5, 4)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, np.tile(np.float32([0.5, 7, 0.8, 0.1]), (5, 1)))


def test_one_override_covers_the_slots_of_codes_only() -> None:
    table = SamplingParams(0.5, 7, 0.8, 0.1, visual=SlotSampling(temperature=2.0, top_k=0)).table(5)
    np.testing.assert_array_equal(table[[0, 4]], np.tile(np.float32([0.5, 7, 0.8, 0.1]), (2, 1)))
    np.testing.assert_array_equal(table[1:4], np.tile(np.float32([2, 0, 0.8, 0.1]), (3, 1)))


def test_overrides_per_slot_inherit_where_they_are_none() -> None:
    visual = (None, SlotSampling(top_p=0.3), None)
    table = SamplingParams(0.5, 7, 0.8, 0.1, visual=visual).table(5)
    assert table[:, 2].tolist() == np.float32([0.8, 0.8, 0.3, 0.8, 0.8]).tolist()


def test_overrides_must_match_the_slots() -> None:
    with pytest.raises(InputError, match="each of the 3 slots"):
        SamplingParams(visual=(None,)).table(5)


def test_parameters_are_immutable_and_drawing_is_greedy() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3  # type: ignore[misc]
    assert GREEDY_DRAWING.temperature == 0
    assert GREEDY_DRAWING.max_blocks is None


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"cfg": -1.0},
        {"cfg": float("nan")},
        {"shift": 0.0},
        {"shift": 1e-20},
        {"height": 0},
        {"width": -32},
        {"scheduler": "ddim"},
        {"seed": 1 << 64},
    ],
)
def test_impossible_render_values_are_refused(values: dict) -> None:
    with pytest.raises(InputError, match=f"RenderParams.{next(iter(values))} must"):
        RenderParams(**values)
