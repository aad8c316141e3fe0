"""The released denoising loop in plain torch, step for step, as the thing to beat.

Not a strawman: matrix products, convolutions and attention are torch's own. What the release
wastes is what makes it slow, and it is all here: at guidance 1 the unconditional half is computed
and multiplied by zero, padding is attended with a bias, and captions, cross-attention keys and
values and the modulation are computed anew in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kelix_rt.stages.schedules import flow_euler
from tests.models.plain_dit import PlainDiT


@dataclass
class ReferenceState:
    """One image between denoise steps. tokens, mask: unconditional rows, then conditional ones."""

    latent: Tensor
    tokens: Tensor
    mask: Tensor
    timesteps: Tensor
    sigmas: Tensor
    guidance: float
    index: int = 0


class ReferenceSampler:
    """Flow-matching Euler with classifier-free guidance over a `PlainDiT`."""

    def __init__(self, dit: PlainDiT) -> None:
        self.dit = dit

    def start(
        self,
        condition: Tensor,
        mask: Tensor,
        latent: Tensor,
        steps: int,
        guidance: float = 1.0,
    ) -> ReferenceState:
        """condition [1, L, K], zero behind the valid rows; mask [1, L] of 1 and 0; latent [1, C, h,
        w]. The connector runs here, once, as in the release."""
        tokens = self.dit.connect(condition)
        rows = self.dit.tensors["y_embedder.y_embedding"][: tokens.shape[1]]
        uncond, real = torch.zeros_like(tokens), torch.zeros_like(mask)
        uncond[:, : len(rows)], real[:, : len(rows)] = rows, 1
        schedule = flow_euler(steps)
        return ReferenceState(
            latent,
            torch.cat((uncond, tokens)),
            torch.cat((real, mask)),
            schedule.timesteps,
            schedule.sigmas,
            guidance,
        )

    def step(self, state: ReferenceState) -> None:
        """One denoise step; the latent is carried in its own dtype, as in the release."""
        x, i = state.latent, state.index
        times = state.timesteps[i].to(x.device).expand(2)
        both = self.dit.velocity(torch.cat((x, x)), times, state.tokens, state.mask)
        uncond, cond = both.chunk(2)
        velocity = uncond + state.guidance * (cond - uncond)
        change = (state.sigmas[i + 1] - state.sigmas[i]) * velocity  # rounded to its dtype
        state.latent = (x.float() + change).to(x.dtype)
        state.index += 1
