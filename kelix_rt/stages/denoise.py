"""Denoising one step at a time, several requests in one batch.

The latent is carried in float32 whatever the model's dtype: the release rounds it to bfloat16
after every step, which only adds error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kelix_rt import ops
from kelix_rt.errors import InputError
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_condition import ConditionCache, merge_conditions
from kelix_rt.models.transfer import to_device
from kelix_rt.stages.schedules import Schedule, dpm_coefficients, flow_dpm, flow_euler

Scheduler = Literal["euler", "dpm++"]
_SCHEDULES: dict[str, Callable[[int, float], Schedule]] = {"euler": flow_euler, "dpm++": flow_dpm}
_UnconditionalKey = tuple[int, int, int | None, int | None]
KEPT_STEPS = 200  # steps of the schedules that are kept between drawings, four of 50


@dataclass(frozen=True)
class _Plan:
    """What a schedule gives every step, on the model's device.

    modulation: [6 * depth + 2, steps, C]. sigmas: [steps + 1]. weights: [steps, 3] of the
    multistep solver; for Euler [steps, 1], the step of sigma.
    """

    scheduler: str
    modulation: Tensor
    sigmas: Tensor
    weights: Tensor

    @property
    def steps(self) -> int:
        return len(self.weights)


@dataclass(eq=False)
class RenderState:
    """One request between denoise steps: rows of latents with one schedule and one guidance.

    latent: [B, C, h, w] float32, as it is after `index` of `steps` steps. seed: of the noise it
    started from, None if that was given.
    """

    plan: _Plan
    latent: Tensor
    condition: ConditionCache
    uncond: ConditionCache | None
    guidance: Tensor
    seed: int | None = None
    index: int = 0
    clean: Tensor | None = None  # the multistep solver's previous prediction

    @property
    def steps(self) -> int:
        """Denoise steps in all."""
        return self.plan.steps

    @property
    def done(self) -> bool:
        """Whether all steps were taken."""
        return self.index >= self.steps


@dataclass(frozen=True)
class _Batch:
    """States that run together, and what stays the same while they do.

    repeats: rows of each state. guided: rows evaluated a second time without condition, behind all
    others. twin: for every row, where its unconditional velocity stands (itself if unguided).
    """

    states: tuple[RenderState, ...]
    cache: ConditionCache
    repeats: tuple[int, ...]
    guidance: Tensor
    guided: Tensor | None
    twin: Tensor | None


class Denoiser:
    """Steps `RenderState`s through a KelixDiT.

    evaluate: `KelixDiT.forward_cached`, or what stands in for it.
    """

    def __init__(self, dit: KelixDiT) -> None:
        self.dit = dit
        self.evaluate: Callable[[Tensor, Tensor, ConditionCache], Tensor] = dit.forward_cached
        self._plans: dict[tuple[str, int, float], _Plan] = {}
        self._batches: dict[tuple[object, ...], _Batch] = {}
        # Kept as long as a guided state that uses it, and no longer.
        self._unconditional: WeakValueDictionary[_UnconditionalKey, ConditionCache] = (
            WeakValueDictionary()
        )

    def start(
        self,
        condition: ConditionCache,
        latent: Tensor,
        steps: int,
        cfg: float = 1.0,
        shift: float = 3.0,
        scheduler: str = "euler",
        seed: int | None = None,
    ) -> RenderState:
        """A state that has taken no step; latent [B, C, h, w] is copied to float32.

        cfg 1 evaluates the condition alone. Raises InputError for an unknown scheduler and for
        steps or shift out of range.
        """
        uncond = None
        if cfg != 1.0:
            uncond = self._uncond(condition)
        device = self.dit.device
        start = latent.to(device=device, dtype=torch.float32, copy=True).contiguous()
        guidance = torch.full((len(latent),), cfg, dtype=torch.float32, device=device)
        plan = self._plan(scheduler, steps, shift)
        return RenderState(plan, start, condition, uncond, guidance, seed)

    def _uncond(self, condition: ConditionCache) -> ConditionCache:
        """The guidance's other half, made once for all drawings in flight that it fits."""
        rotary = self.dit.config.use_cross_attn_rope
        grid = condition.grid_length if rotary else None
        key = (condition.batch, condition.capacity, grid, condition.image_size)
        known = self._unconditional.get(key)
        if known is None:
            known = self._unconditional[key] = self.dit.unconditional(*key)
        return known

    def _plan(self, scheduler: str, steps: int, shift: float) -> _Plan:
        key = (scheduler, steps, shift)
        if key not in self._plans:
            if scheduler not in _SCHEDULES:
                raise InputError(
                    f"scheduler must be one of {', '.join(_SCHEDULES)}, got {scheduler!r}"
                )
            schedule = _SCHEDULES[scheduler](steps, shift)
            sigmas = schedule.sigmas
            weights = (
                dpm_coefficients(sigmas) if scheduler == "dpm++" else sigmas.diff().unsqueeze(1)
            )
            modulation = self.dit.prepare_modulation(schedule.timesteps)
            device = self.dit.device
            plan = _Plan(scheduler, modulation, sigmas.to(device), weights.to(device))
            self._plans[key] = plan
            while sum(kept.steps for kept in self._plans.values()) > KEPT_STEPS:
                self._plans.pop(next(iter(self._plans)))
            return plan
        return self._plans[key]

    @torch.inference_mode()
    def step(self, states: Sequence[RenderState]) -> None:
        """One denoise step of every state; those of one latent size and solver run as one batch.

        Raises InputError for a state that is done.
        """
        groups: dict[tuple[object, ...], list[RenderState]] = {}
        for state in states:
            if state.done:
                raise InputError(f"step: a state has taken all its {state.steps} steps")
            key = (*state.latent.shape[1:], state.plan.scheduler)
            groups.setdefault(key, []).append(state)
        self._batches = {key: self._join(key, tuple(group)) for key, group in groups.items()}
        for batch in self._batches.values():
            self._advance(batch)

    def release(self, state: RenderState) -> None:
        """Forgets the batches that hold `state`, so that its memory can go."""
        self._batches = {k: b for k, b in self._batches.items() if state not in b.states}

    def forget(self) -> None:
        """Lets go of everything that is kept between drawings."""
        self._plans.clear()
        self._batches.clear()

    def _join(self, key: tuple[object, ...], states: tuple[RenderState, ...]) -> _Batch:
        known = self._batches.get(key)
        if known is not None and known.states == states:
            return known
        repeats = tuple(len(state.latent) for state in states)
        caches = [state.condition for state in states]
        extra = [state.uncond for state in states if state.uncond is not None]
        guidance = torch.cat([state.guidance for state in states])
        cache = merge_conditions([*caches, *extra])
        if not extra:
            return _Batch(states, cache, repeats, guidance, None, None)
        rows = sum(repeats)
        twin = list(range(rows))
        guided: list[int] = []
        row = 0
        for state, count in zip(states, repeats, strict=True):
            for _ in range(count):
                if state.uncond is not None:
                    twin[row] = rows + len(guided)
                    guided.append(row)
                row += 1
        device = self.dit.device
        both = to_device(guided, device), to_device(twin, device)
        return _Batch(states, cache, repeats, guidance, *both)

    def _advance(self, batch: _Batch) -> None:
        states = batch.states
        latent = states[0].latent
        if len(states) > 1:
            latent = torch.cat([state.latent for state in states])
        velocity, uncond = self._velocity(batch, latent)
        weights = _per_row(batch, [state.plan.weights[state.index] for state in states])
        if states[0].plan.scheduler == "euler":
            guidance = None if uncond is None else batch.guidance
            ops.euler_step(latent, velocity, uncond, weights[:, 0].contiguous(), guidance)
        else:
            latent = _multistep(batch, latent, velocity, uncond, weights)
        parts = latent.split(list(batch.repeats))
        for state, part in zip(states, parts, strict=True):
            state.latent = part
            state.index += 1

    def _velocity(self, batch: _Batch, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        modulation = _per_row(
            batch, [state.plan.modulation[:, state.index] for state in batch.states], dim=1
        )
        if batch.guided is None or batch.twin is None:
            return self.evaluate(latent, modulation, batch.cache), None
        both = torch.cat((latent, latent.index_select(0, batch.guided)))
        modulation = torch.cat((modulation, modulation.index_select(1, batch.guided)), dim=1)
        velocity = self.evaluate(both, modulation, batch.cache)
        return velocity[: len(latent)], velocity.index_select(0, batch.twin)


def _per_row(batch: _Batch, values: list[Tensor], dim: int = 0) -> Tensor:
    """One value per state -> one per row, stacked in dimension `dim`."""
    rows = [v for v, n in zip(values, batch.repeats, strict=True) for _ in range(n)]
    return torch.stack(rows, dim=dim)


def _multistep(
    batch: _Batch, latent: Tensor, velocity: Tensor, uncond: Tensor | None, weights: Tensor
) -> Tensor:
    """DPM-Solver++(2M): the next latent; keeps each state's clean prediction for the step after."""
    speed = velocity.float()
    if uncond is not None:
        base = uncond.float()
        speed = base + batch.guidance.view(-1, 1, 1, 1) * (speed - base)
    sigmas = _per_row(batch, [state.plan.sigmas[state.index] for state in batch.states])
    clean = latent - sigmas.view(-1, 1, 1, 1) * speed
    parts = clean.split(list(batch.repeats))
    before = torch.cat(
        [
            part if state.clean is None else state.clean
            for state, part in zip(batch.states, parts, strict=True)
        ]
    )
    for state, part in zip(batch.states, parts, strict=True):
        state.clean = part
    a, b, c = (column.view(-1, 1, 1, 1) for column in weights.unbind(1))
    return a * latent + b * clean + c * before


def sample(
    dit: KelixDiT,
    condition: Tensor,
    mask: Tensor | None,
    latent: Tensor,
    steps: int,
    cfg: float = 1.0,
    shift: float = 3.0,
    scheduler: Scheduler = "euler",
    callback: Callable[[int, Tensor], None] | None = None,
    grid_length: int | None = None,
    image_size: int | None = None,
) -> Tensor:
    """Denoises latent [B, C, h, w] and returns it after every step, [steps, B, C, h, w] float32.

    condition, mask, grid_length, image_size: as in `KelixDiT.velocity`. cfg 1 runs no unconditional
    half; otherwise the velocity is u + cfg * (c - u), u coming from the stored unconditional
    embedding, at most as long as the padded condition. callback(index, latent) follows every step.
    Raises InputError.
    """
    denoiser = Denoiser(dit)
    cache = dit.prepare_condition(condition, mask, grid_length, image_size=image_size)
    state = denoiser.start(cache, latent, steps, cfg, shift, scheduler)
    visited = []
    while not state.done:
        denoiser.step([state])
        visited.append(state.latent.clone())
        if callback is not None:
            callback(state.index - 1, visited[-1])
    return torch.stack(visited)
