"""Checkpoints of training stages: written whole or not at all, and refused when they do not fit."""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kelix_rt.errors import ConfigError, KelixError
from kelix_rt.train.world_scene import WORLD_VERSION, require_world


class TrainingError(KelixError, RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is good."""


@dataclass(frozen=True)
class StageIdentity:
    """What must be equal for a checkpoint to be continued: stage, world and settings."""

    stage: str
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls, stage: str, trained: Sequence[nn.Parameter], config: Mapping[str, Any], **settings: Any
    ) -> StageIdentity:
        """The identity of a stage; values are compared as JSON."""
        own = {"parameters": sum(p.numel() for p in trained), **settings, "config": config}
        return cls(stage, json.loads(json.dumps(own)))

    def require(self, path: Path, found: Mapping[str, Any]) -> None:
        """Raises ConfigError when the checkpoint `found` in `path` is not of this identity."""
        try:
            require_world(found.get("world_version"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if found.get("stage") != self.stage:
            raise ConfigError(f"{path}: must be of stage {self.stage}, got {found.get('stage')!r}")
        stored = found.get("settings", {})
        names = sorted({*stored, *self.settings})
        differing = [n for n in names if stored.get(n) != self.settings.get(n)]
        if differing:
            listed = "; ".join(f"{n} {stored.get(n)} -> {self.settings.get(n)}" for n in differing)
            raise ConfigError(
                f"{path}: was trained with other settings ({listed}); use the same settings, or "
                "another output directory"
            )


def save_state(
    path: Path,
    identity: StageIdentity,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """Replaces the checkpoint in one step; raises TrainingError and keeps the old one otherwise."""
    buffer = io.BytesIO()
    torch.save(
        {
            "stage": identity.stage,
            "world_version": WORLD_VERSION,
            "settings": identity.settings,
            "step": step,
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizer": optimizer.state_dict(),
        },
        buffer,
    )
    write_whole(path, buffer.getbuffer())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file so that a reader sees the old content or all of the new one.

    Raises TrainingError naming the reason (such as a full disk); the old file is then untouched.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = f"the last good one is kept in {path}" if path.exists() else "there is none before"
        raise TrainingError(
            f"{path} ({len(data) / 1e6:.1f} MB) cannot be written: {error.strerror or error}; "
            f"{kept}. Free some space and start again: training resumes from it"
        ) from error


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Holds `path`.lock, which ends with the process. TrainingError where another one holds it."""
    with open(path.with_name(path.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"{path}: another process trains this stage; wait for it, stop it, or use another "
                "output directory"
            ) from error
        yield


def steps_done(path: Path) -> int:
    """Steps that the checkpoint of a stage has taken; 0 without one. Raises ConfigError."""
    return int(_read(path)["step"]) if path.exists() else 0


def load_state(
    path: Path,
    identity: StageIdentity,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Fills modules and optimiser from a checkpoint and returns its step. Raises ConfigError."""
    found = _read(path)
    identity.require(path, found)
    _fill(path, found, modules)
    optimizer.load_state_dict(found["optimizer"])
    return int(found["step"])


def load_modules(path: Path, modules: Mapping[str, nn.Module]) -> int:
    """Fills modules from the checkpoint of an earlier stage, which must be finished, and returns
    its step.

    Raises ConfigError when the file is absent, of another world version, or does not hold them.
    """
    found = _read(path)
    try:
        require_world(found.get("world_version"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    done, steps = found["step"], found["settings"]["steps"]
    if done < steps:
        raise ConfigError(f"{path} stopped at step {done} of {steps}; finish that stage first")
    _fill(path, found, modules)
    return int(done)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run the stage that writes it first") from None
    except Exception as error:  # torch raises many unrelated types for damaged files
        raise ConfigError(f"{path} cannot be read as a training checkpoint: {error}") from error
    if not isinstance(found, dict) or "modules" not in found:
        raise ConfigError(f"{path} is no training checkpoint")
    return found


def _fill(path: Path, found: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if name not in found["modules"]:
            raise ConfigError(f"{path} holds {sorted(found['modules'])}, but no module {name!r}")
        try:
            module.load_state_dict(found["modules"][name])
        except RuntimeError as error:
            raise ConfigError(f"{path}: module {name} is of another shape: {error}") from None
