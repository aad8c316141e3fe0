"""One training stage: optimiser, schedule, checkpoints, progress. What is learned is the caller's.

    run_stage("align", modules={"model": model}, parameters=model.parameters(),
              loss_fn=lambda step: {"loss": ...}, steps=500, lr=1e-3, warmup=50, out=Path("run"))

The loss must be a function of the step and of torch's global generator, which is seeded anew for
every step: a stage that was interrupted then ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from kelix_rt.models import products
from kelix_rt.train.products import Bfloat16Products
from kelix_rt.train.progress import StageLog
from kelix_rt.train.states import (
    StageIdentity,
    TrainingError,
    load_state,
    only_writer,
    save_state,
)

__all__ = ["StageResult", "TrainingError", "learning_rate", "run_stage"]

LossFn = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: its checkpoint, the step it resumed from, and the last logged means."""

    checkpoint: Path
    resumed_from: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to `floor` (a fraction of the peak)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def run_stage(
    name: str,
    *,
    modules: Mapping[str, nn.Module],
    parameters: Iterable[nn.Parameter],
    loss_fn: LossFn,
    steps: int,
    lr: float,
    warmup: int,
    out: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    log_every: int = 50,
    save_every_seconds: float = 45.0,
    config: Mapping[str, Any] | None = None,
    lr_floor: float = 0.01,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    on_log: Callable[[int], Mapping[str, float] | None] | None = None,
    console: Console | None = None,
) -> StageResult:
    """Optimises `loss_fn(step)["loss"]` over `parameters` with AdamW; resumes where it stopped.

    modules: what the checkpoint `out/<name>.pt` holds, by name. loss_fn: tensors by name, all
    logged (as `out/<name>.jsonl` and on the console). bfloat16 `dtype`: of the factors of products,
    where the device multiplies them fast. clip: largest gradient norm. config: JSON-like facts the
    stage depends on, such as sizes and data; a checkpoint of others is refused. on_log: called
    after every logged step, for measures and pictures that are not part of the loss; what it
    returns is logged too.

    A stage already at its last step is only loaded. Raises ConfigError for a checkpoint of another
    world version or config, TrainingError for a loss or gradient that is not finite, for a
    checkpoint that cannot be written, and where another process trains the stage; the last good
    checkpoint stays in place in any case.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError(f"run_stage: stage {name} has no parameter that requires a gradient")
    optimizer = torch.optim.AdamW(
        trained, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, fused=True
    )
    identity = StageIdentity.of(
        name, trained, dict(config or {}), steps=steps, lr=lr, warmup=warmup, seed=seed,
        lr_floor=lr_floor, weight_decay=weight_decay, clip=clip, dtype=str(dtype),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.pt"
    with ExitStack() as held:
        held.enter_context(only_writer(path))
        start = load_state(path, identity, modules, optimizer) if path.exists() else 0
        saved_at = time.monotonic()
        log = StageLog(name, out / f"{name}.jsonl", start, steps, console or Console())
        held.enter_context(log)
        for step in range(start, steps):
            torch.manual_seed(seed * 1_000_003 + step)
            rate = learning_rate(step, steps, lr, warmup, lr_floor)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = _optimise(name, step, loss_fn, optimizer, trained, device, dtype, clip, path)
            log.add(losses)
            done = step + 1
            if done % log_every == 0 or done == steps:
                extra = _measured(name, done, on_log, path)
                log.write(done, rate, extra or {})
            if time.monotonic() - saved_at >= save_every_seconds or done == steps:
                save_state(path, identity, modules, optimizer, done)
                saved_at = time.monotonic()
    return StageResult(path, start, steps, log.last)


def _optimise(
    name: str,
    step: int,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    device: torch.device | str,
    dtype: torch.dtype,
    clip: float,
    path: Path,
) -> dict[str, Tensor]:
    with _precision(device, dtype):
        losses = loss_fn(step)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(trained, clip)
    value = float(losses["loss"].detach())
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        kept = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint"
        raise TrainingError(
            f"stage {name}: step {step} gave loss {value} and gradient norm {float(norm)}; {kept}. "
            "Lower the learning rate or look at the data of this step"
        )
    optimizer.step()
    return {key: loss.detach() for key, loss in losses.items()} | {"grad_norm": norm.detach()}


def _measured(
    name: str,
    step: int,
    on_log: Callable[[int], Mapping[str, float] | None] | None,
    path: Path,
) -> Mapping[str, float] | None:
    try:
        return None if on_log is None else on_log(step)
    except OSError as error:  # a picture that cannot be written, on a full disk
        raise TrainingError(
            f"stage {name}: step {step} cannot be shown: {error}; the last good checkpoint is "
            f"{path if path.exists() else 'not written yet'}"
        ) from error


def _precision(device: torch.device | str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    if dtype == torch.bfloat16 and products.are_native(dtype, device):
        return Bfloat16Products()
    return nullcontext()
