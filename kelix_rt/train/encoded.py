"""What a finished model makes of the training pictures: made once, batch by batch, and kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kelix_rt.train.states import write_whole
from kelix_rt.train.world_scene import WORLD_VERSION

SAVE_EVERY_SECONDS = 45.0

Batch = tuple[str, Callable[[], Tensor]]


def encoded(
    cache: Path,
    facts: Mapping[str, object],
    model: nn.Module,
    plan: Callable[[], Sequence[Batch]],
) -> dict[str, Tensor]:
    """Tensors by name: those of the batches of that name end to end. plan: what they are, asked
    where any is to be made.

    Read from `cache` when it holds exactly them: it names the world, `facts` and the weights of
    `model`; another one is replaced. What an interrupted call had made is in `<cache>.part` and not
    made again. Raises TrainingError when they cannot be written.
    """
    label = str({"world": WORLD_VERSION, "weights": fingerprint(model), **facts})
    whole = _read(cache, label)
    if whole is not None:
        return whole[0]
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = cache.with_name(cache.name + ".part")
    made, first = _read(part, label) or ({}, 0)
    found = {name: [tensor] for name, tensor in made.items()}
    batches, saved_at = plan(), time.monotonic()
    for number in track(range(first, len(batches)), description=f"encoding for {cache.stem}"):
        name, make = batches[number]
        found.setdefault(name, []).append(make())
        if time.monotonic() - saved_at >= SAVE_EVERY_SECONDS:
            _write(part, label, found, number + 1)
            saved_at = time.monotonic()
    made = _write(cache, label, found, len(batches))
    part.unlink(missing_ok=True)
    return made


def fingerprint(model: nn.Module) -> str:
    """A short text that differs when any weight of the model does."""
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(file: Path, label: str) -> tuple[dict[str, Tensor], int] | None:
    """The tensors of a file that is of this label, and of how many batches they are."""
    if not file.exists():
        return None
    with safe_open(str(file), framework="pt") as stored:
        facts = stored.metadata() or {}
        if facts.get("made_of") != label:
            return None
        names = stored.keys()
        return {name: stored.get_tensor(name) for name in names}, int(facts["batches"])


def _write(
    file: Path, label: str, found: Mapping[str, list[Tensor]], batches: int
) -> dict[str, Tensor]:
    made = {name: torch.cat(parts).contiguous() for name, parts in found.items()}
    write_whole(file, save(made, {"made_of": label, "batches": str(batches)}))
    return made
