"""Parity of the image DiT with golden outputs of the released implementation.

In float32 tensors are compared absolutely and schedules bit by bit; in lower precisions tensors
are compared by relative RMS error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from kelix_rt import ops
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_blocks import NORM_EPS
from kelix_rt.models.dit_positions import condition_positions, grid_positions
from kelix_rt.parity.fixtures import Fixtures
from kelix_rt.parity.report import Check, relative_rms
from kelix_rt.stages.denoise import Scheduler, sample
from kelix_rt.stages.schedules import Schedule, flow_dpm, flow_euler, flow_euler_twice_shifted

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The frequencies of the timestep come from torch.exp, which differs in the last bit between CPUs:
# three of 128 so changed move a velocity by 8e-6. On an Intel CPU a golden velocity (tiny_release)
# is 1.1e-5 from a run in float64 but for these frequencies, the package's 2e-6.
VELOCITY = INTERMEDIATE = EULER = 2e-5
DPM = 1e-4  # the golden run itself is off by 4e-5
BFLOAT16_RUN = 1e-2
DEFAULT_SHIFT = 3.0


def run(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> list[Check]:
    """Checks one golden directory; fixtures that are absent give no row."""
    dit = KelixDiT.from_pretrained(path, device, dtype)
    golden = Fixtures(path, device, dit.dtype)
    parts = (schedules(golden), _positions(golden, dit), _forward(golden, dit))
    rows = [row for part in parts for row in part]
    return rows + list(_samples(golden, dit)) + list(_dpm(golden, dit))


class Layout(TypedDict, total=False):
    """What rotary positions of a condition were laid out for: see `KelixDiT.prepare_condition`."""

    grid_length: int
    image_size: int


def layout(golden: Fixtures) -> Layout:
    """As far as the notes tell it: the token count before truncation, the side of the picture."""
    call = golden.notes.get("pos_args_call") or {}
    known: Layout = {}
    if call.get("token_embed_lengths"):
        known["grid_length"] = int(call["token_embed_lengths"][0])
    if call.get("image_size"):
        known["image_size"] = int(call["image_size"])
    return known


def _shift(golden: Fixtures) -> float:
    return float(golden.notes.get("flow_shift", DEFAULT_SHIFT))


def _schedule(golden: Fixtures, prefix: str, schedule: Schedule) -> Iterator[Check]:
    yield from golden.same(f"{prefix}sigmas", schedule.sigmas)
    yield from golden.same(f"{prefix}timesteps", schedule.timesteps)
    yield from golden.same(f"{prefix}timesteps_long", schedule.timesteps.long())


def schedules(golden: Fixtures, sampled: str = "sample.") -> Iterator[Check]:
    """Noise levels and timesteps, bit by bit; `sampled` prefixes those of the sampled images."""
    shift = _shift(golden)
    pattern = re.compile(r"schedule(\d+)(_default)?\.")
    names = sorted({m.group(0) for key in golden.tensors if (m := pattern.match(key))})
    for name in names:
        match = pattern.match(name)
        assert match is not None
        make = flow_euler_twice_shifted if match.group(2) else flow_euler
        yield from _schedule(golden, name, make(int(match.group(1)), shift))
    if f"{sampled}timesteps" in golden:
        steps = len(golden[f"{sampled}timesteps"])
        yield from _schedule(golden, sampled, flow_euler(steps, shift))
    if "dpm.timesteps" in golden:
        steps = len(golden["dpm.timesteps"]) - 1
        yield from golden.same("dpm.timesteps", flow_dpm(steps, shift).sigmas)


def _positions(golden: Fixtures, dit: KelixDiT) -> Iterator[Check]:
    call = golden.notes.get("pos_args_call")
    if call is None:
        return
    image = grid_positions(*call["latent_hw"])
    tables = {"x_input_pos": image}
    if call.get("token_embed_lengths"):
        length = call["token_embed_lengths"][0]
        tables["cond_input_pos"] = condition_positions(call["max_seq_len"], length)
    for name, table in tables.items():
        yield from golden.same(f"pos.{name}.height", table[:, 0])
        yield from golden.same(f"pos.{name}.width", table[:, 1])


@torch.no_grad()
def _forward(golden: Fixtures, dit: KelixDiT) -> Iterator[Check]:
    if "fwd.latent" not in golden:
        return
    latent, timestep = golden["fwd.latent"], golden["fwd.timestep"]
    condition, mask = golden["fwd.cond_embeds"], golden["fwd.mask"]
    connected = dit.connect(condition.to(dit.dtype))
    captions = dit.project_caption(connected)
    time = dit.embed_time(timestep)
    steps = {
        "connector_out": connected,
        "y_embed": captions,
        "y_norm": dit.normalise_caption(captions),
        "t_emb": time,
        "t_block": dit.block_time(time),
        "x_embed": dit.embed_latent(latent),
    }
    watched, velocity = _watch(dit, latent, timestep, condition, mask, **layout(golden))
    for name, value in {**steps, **watched}.items():
        yield from golden.close(f"fwd.{name}", value, INTERMEDIATE)
    yield from golden.close("fwd.velocity", velocity, VELOCITY)


def _watch(
    dit: KelixDiT,
    latent: Tensor,
    timestep: Tensor,
    condition: Tensor,
    mask: Tensor,
    **layout: Unpack[Layout],
) -> tuple[dict[str, Tensor], Tensor]:
    """One velocity and what passes inside; blocks overwrite their input, so all is copied."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[name] = output.clone()

        return module.register_forward_hook(hook)

    def normed(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["block.0.norm1"] = ops.layer_norm(inputs[0], None, None, NORM_EPS)

    first = dit.blocks[0]
    parts = {"attn": first.attn, "cross_attn": first.cross, "mlp": first.mlp}
    handles = [keep(f"block.0.{name}", part) for name, part in parts.items()]  # type: ignore[arg-type]
    handles += [keep(f"block.{i}", block) for i, block in enumerate(dit.blocks)]
    handles += [keep("final_layer", dit.final), first.register_forward_pre_hook(normed)]
    try:
        velocity = dit.velocity(latent, timestep, condition, mask, **layout)
    finally:
        for handle in handles:
            handle.remove()
    return seen, velocity


def _samples(golden: Fixtures, dit: KelixDiT) -> Iterator[Check]:
    pattern = re.compile(r"sample\.cfg([\d.]+)\.latents")
    for key in sorted(golden.tensors):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        cfg = float(match.group(1))
        latents = _sample(golden, dit, golden[key], cfg, "euler")
        yield from golden.close(key, latents, EULER)
        rounded = f"{key}_bf16run"
        if rounded in golden:
            yield relative_rms(rounded, latents, golden[rounded], BFLOAT16_RUN)
        yield from _velocities(golden, dit, match.group(1))


def _dpm(golden: Fixtures, dit: KelixDiT) -> Iterator[Check]:
    if "dpm.latents" in golden:
        latents = _sample(golden, dit, golden["dpm.latents"], 1.0, "dpm++")
        yield from golden.close("dpm.latents", latents, DPM)


def _sample(
    golden: Fixtures, dit: KelixDiT, wanted: Tensor, cfg: float, scheduler: Scheduler
) -> Tensor:
    """The latent after every step, as `wanted` has them: [S * B, C, h, w] or [S, B, C, h, w]."""
    start = golden["sample.latent0"]
    latents = sample(
        dit,
        golden["sample.cond_embeds"],
        golden["sample.mask"],
        start,
        wanted.numel() // start.numel(),
        cfg,
        _shift(golden),
        scheduler,
        **layout(golden),
    )
    return latents if wanted.dim() > start.dim() else latents.flatten(0, 1)


def _velocities(golden: Fixtures, dit: KelixDiT, cfg: str) -> Iterator[Check]:
    """The velocity at every latent of the golden trajectory, so that errors do not add up."""
    prefix = f"sample.cfg{cfg}"
    start = golden["sample.latent0"]
    visited = golden[f"{prefix}.latents"].reshape(-1, *start.shape)
    latents = torch.cat((start.unsqueeze(0), visited[:-1]))
    modulation = dit.prepare_modulation(flow_euler(len(latents), _shift(golden)).timesteps)
    condition = dit.prepare_condition(
        golden["sample.cond_embeds"], golden["sample.mask"], **layout(golden)
    )
    rows = condition.batch
    caches = {
        "v_cond": condition,
        "v_uncond": dit.unconditional(
            rows, condition.capacity, condition.grid_length, condition.image_size
        ),
    }
    for name, cache in caches.items():
        if f"{prefix}.{name}" in golden:
            steps = [
                dit.forward_cached(latent, modulation[:, i : i + 1].expand(-1, rows, -1), cache)
                for i, latent in enumerate(latents)
            ]
            join = torch.stack if golden[f"{prefix}.{name}"].dim() > start.dim() else torch.cat
            yield from golden.close(f"{prefix}.{name}", join(steps), VELOCITY)
