"""Noise levels and solver coefficients of flow matching, where x = (1 - sigma) x0 + sigma noise.

The model sees trunc(timestep), so the last float32 digit of a schedule decides which integer it
gets (874.99994 is 874). Each function therefore fixes the order and the dtype of its arithmetic;
an algebraically equal form is not good enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kelix_rt.errors import InputError

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """The noise levels a sampler visits.

    sigmas [steps + 1] float32 on the CPU, falling, the last one 0; timesteps [steps] float32,
    sigma * 1000, not yet truncated.
    """

    sigmas: Tensor
    timesteps: Tensor

    @property
    def steps(self) -> int:
        """Number of model evaluations."""
        return len(self.timesteps)


def _checked(name: str, steps: int, shift: float) -> float:
    """The shift as a Python number: one of numpy's would make the arithmetic float64."""
    if steps < 1:
        raise InputError(f"{name}: steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"{name}: shift must be finite and above 0, got {shift}")
    return float(shift)


def _ending_at_zero(sigmas: np.ndarray) -> Schedule:
    levels = torch.from_numpy(np.append(sigmas, np.float32(0)).astype(np.float32))
    return Schedule(levels, levels[:-1] * TRAIN_STEPS)


def flow_euler(steps: int, shift: float = 3.0) -> Schedule:
    """The release's schedule: sigma = s u / (1 + (s - 1) u) for u from 1 to 1/steps.

    u is numpy's float64 linspace rounded to float32; s and s - 1 are rounded before they meet it,
    and the rest is float32. Raises InputError for
    steps < 1 or a shift that is not a positive number.
    """
    shift = _checked("flow_euler", steps, shift)
    raw = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    return _ending_at_zero(shift * raw / (1 + (shift - 1) * raw))


def flow_euler_twice_shifted(steps: int, shift: float = 3.0) -> Schedule:
    """The schedule diffusers' flow-matching Euler scheduler makes when it is given no sigmas.

    Its ends are already shifted, in float32, and the whole grid is shifted again, in float64.
    """
    shift = _checked("flow_euler_twice_shifted", steps, shift)
    ends = torch.tensor([TRAIN_STEPS, 1.0]) / TRAIN_STEPS
    highest, lowest = (shift * ends / (1 + (shift - 1) * ends)).tolist()
    raw = np.linspace(TRAIN_STEPS * highest, TRAIN_STEPS * lowest, steps) / TRAIN_STEPS
    return _ending_at_zero((shift * raw / (1 + (shift - 1) * raw)).astype(np.float32))


def flow_dpm(steps: int, shift: float = 3.0) -> Schedule:
    """The grid of DPM-Solver++: uniform in time from 0.999 to 0, shifted, float32 throughout."""
    shift = _checked("flow_dpm", steps, shift)
    line = 1 - torch.linspace(1, 0.001, steps + 1, dtype=torch.float32)
    sigmas = (shift * line / (1 + (shift - 1) * line)).flip(0)
    return Schedule(sigmas, sigmas[:-1] * TRAIN_STEPS)


def dpm_coefficients(sigmas: Tensor) -> Tensor:
    """Weights of the second-order multistep DPM-Solver++ updates (Lu et al. 2022), [steps, 3].

    Update i is x <- a x + b m + c m_prev, where m = x - sigma v is the predicted clean latent at
    sigma_i and m_prev that of the update before (c is 0 in the first and the last update, which
    are first order). float32, computed in float64. sigmas: [steps + 1], falling to 0.
    """
    levels = sigmas.double().tolist()
    log_snr = [math.log((1 - sigma) / sigma) for sigma in levels[:-1]]
    rows = []
    last = len(levels) - 2
    for i in range(last):
        gap = log_snr[i + 1] - log_snr[i]
        gain = -(1 - levels[i + 1]) * math.expm1(-gap)
        ratio = 0.0 if i == 0 else 0.5 * gap / (log_snr[i] - log_snr[i - 1])
        rows.append((levels[i + 1] / levels[i], gain * (1 + ratio), -gain * ratio))
    rows.append((0.0, 1.0, 0.0))
    return torch.tensor(rows, dtype=torch.float32)
