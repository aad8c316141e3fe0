"""What the engine tests share: engines over golden checkpoints, and what must hold afterwards."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from kelix_rt import Engine, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def load_engine(path: Path, **options: Any) -> Engine:
    """An engine on the CPU without text or drawing unless the directory has them."""
    return Engine.from_pretrained(path, device="cpu", **options)


@cache
def fixtures(path: Path) -> dict[str, torch.Tensor]:
    """The golden tensors of a directory."""
    return load_file(path / "fixtures.safetensors")


@cache
def metadata(path: Path) -> dict[str, Any]:
    """The golden metadata of a directory."""
    return json.loads((path / "fixtures.json").read_text())


def golden_runs(path: Path) -> list[str]:
    """Names of the generations a directory holds."""
    return sorted({key.split("/")[0] for key in fixtures(path) if key.startswith("gen")})


def golden_prompt(path: Path, run: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompt ids and image ids of a golden generation."""
    data = fixtures(path)
    return data[f"{run}/prompt_ids2d"], data.get(f"{run}/image_ids")


def golden_sampling(path: Path) -> SamplingParams:
    """Greedy, with the golden budget: the release makes one block more than it was asked for."""
    budget = metadata(path)["generate"]["max_new_tokens"] + 1
    return SamplingParams(temperature=0.0, max_blocks=budget)


def golden_blocks(path: Path, run: str) -> np.ndarray:
    """The generated rows of a golden generation."""
    data = fixtures(path)
    return data[f"{run}/ids"][len(data[f"{run}/prompt_ids2d"]) :].numpy()


def assert_idle(engine: Engine) -> None:
    """Nothing runs and every page is free or cached."""
    pool = engine.scheduler.pool
    assert not engine.has_work
    assert engine._requests == {}
    assert engine._mail == {}
    assert pool.num_used == 0
    assert pool.num_sequences == 0
    assert pool.num_available == pool.num_pages
    pool.check()
