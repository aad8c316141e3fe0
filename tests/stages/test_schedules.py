"""Schedules: the integers the model sees, and the solver's coefficients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kelix_rt.errors import InputError
from kelix_rt.stages.schedules import (
    dpm_coefficients,
    flow_dpm,
    flow_euler,
    flow_euler_twice_shifted,
)

INTEGERS = {
    6: "1000 937 857 750 599 375",
    20: "1000 982 964 944 923 900 874 847 818 785 750 710 666 617 562 500 428 346 250 136",
    50: "1000 993 986 979 971 964 956 948 940 931 923 914 904 895 885 874 864 853 842 830 818 805 "
    "792 778 764 750 734 718 702 684 666 647 627 607 585 562 538 513 486 458 428 397 363 328 290 "
    "250 206 160 111 57",
}


@pytest.mark.parametrize("steps", INTEGERS)
def test_truncated_timesteps(steps: int) -> None:
    got = flow_euler(steps).timesteps.long().tolist()
    assert got == [int(n) for n in INTEGERS[steps].split()]


def test_numbers_of_numpy_change_no_bit() -> None:
    for make in (flow_euler, flow_euler_twice_shifted, flow_dpm):
        assert torch.equal(make(50, np.float64(3)).sigmas, make(50, 3.0).sigmas)


def test_golden_bits(golden: Path) -> None:
    data = load_file(golden / "dit" / "tiny_release" / "fixtures.safetensors")
    assert torch.equal(flow_euler(50).sigmas, data["schedule50.sigmas"])
    assert torch.equal(flow_euler(6).timesteps, data["sample.timesteps"])
    assert torch.equal(flow_dpm(6).sigmas, data["dpm.timesteps"])


@pytest.mark.parametrize("shift", [1.0, 1.15, 2.4, 3.0, 7.3])
@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_schedules_equal_those_of_diffusers(shift: float, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(steps)
    got = flow_euler_twice_shifted(steps, shift)
    assert torch.equal(got.sigmas, oracle.sigmas)
    assert torch.equal(got.timesteps, oracle.timesteps)
    oracle.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    got = flow_euler(steps, shift)
    assert torch.equal(got.sigmas, oracle.sigmas)
    assert torch.equal(got.timesteps, oracle.timesteps)


@pytest.mark.parametrize("make", [flow_euler, flow_euler_twice_shifted, flow_dpm])
@pytest.mark.parametrize("steps", [1, 2, 33, 1000])
def test_shape_and_order(make, steps: int) -> None:  # type: ignore[no-untyped-def]
    schedule = make(steps, 2.0)
    assert schedule.steps == steps and schedule.sigmas.shape == (steps + 1,)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == torch.float32
    assert schedule.sigmas[-1] == 0 and (schedule.sigmas.diff() < 0).all()


@pytest.mark.parametrize("make", [flow_euler, flow_euler_twice_shifted, flow_dpm])
@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (5, 0.0), (5, math.inf), (5, math.nan)])
def test_bad_schedules_are_refused(make, steps: int, shift: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError):
        make(steps, shift)


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_solver_is_exact_for_a_fixed_clean_latent(steps: int) -> None:
    """If the model always predicts the same clean latent, every update lands on its path."""
    sigmas = flow_dpm(steps).sigmas.double()
    clean, noise = 1.7, -0.6
    x = (1 - sigmas[0]) * clean + sigmas[0] * noise
    for i, (a, b, c) in enumerate(dpm_coefficients(sigmas).double()):
        x = a * x + b * clean + c * clean
        want = (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * noise
        assert x.item() == pytest.approx(want.item(), abs=1e-5)


def test_first_and_last_updates_are_first_order() -> None:
    weights = dpm_coefficients(flow_dpm(5).sigmas)
    assert weights[0, 2] == 0 and weights[-1].tolist() == [0, 1, 0]
    assert (weights[1:-1, 2] != 0).all()
