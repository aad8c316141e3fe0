"""Loads what a command needs, with a progress bar."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kelix_rt.cli.output import byte_progress
from kelix_rt.errors import ConfigError

if TYPE_CHECKING:
    from kelix_rt.engine import Engine

# Lines of the memory ledger that the language model's loader reports as it goes.
STREAMED = (
    "backbone",
    "output head",
    "embedding table",
    "block decoder",
    "vision tokenizer",
    "projected codebooks",
    "weights",  # of the DiT
)


def load_engine(
    model: str,
    dit: str | None,
    vae: str | None,
    device: str,
    dtype: str,
    *,
    drawing: bool | None,
    **options: Any,
) -> Engine:
    """An engine, with DiT and VAE where `drawing`: ConfigError before any weight is read if they
    are absent; None takes them where they are found. What no seed is given for differs from run to
    run. options: of EngineConfig.
    """
    from kelix_rt.checkpoint import resolve
    from kelix_rt.config import EngineConfig
    from kelix_rt.devices import choose_dtype
    from kelix_rt.engine import Engine
    from kelix_rt.loading import find_drawing
    from kelix_rt.memory import plan

    directory = resolve(model)
    found = find_drawing(directory, dit, vae, drawing is not False)
    if drawing and found is None:
        raise ConfigError(
            f"drawing needs the image DiT and its VAE: {directory} has no subfolders dit/ and "
            "vae/, so pass --dit and --vae"
        )
    dit_path, vae_path = found or (None, None)
    sources = [directory] if dit_path is None else [directory, dit_path]
    chosen = choose_dtype(dtype)
    options["drawing"] = found is not None
    config = EngineConfig(**options)
    plans = [plan(path, options=config, dtype=chosen) for path in sources]
    entries = [entry for ledger in plans for entry in ledger.entries]
    total = sum(entry.num_bytes for entry in entries if entry.name in STREAMED)
    with byte_progress() as bar:
        task = bar.add_task(f"loading {Path(model).name}", total=total)
        return Engine.from_pretrained(
            directory,
            dit=dit_path,
            vae=vae_path,
            device=device,
            dtype=dtype,
            seed=secrets.randbits(63),
            on_tensor=lambda _, size: bar.advance(task, size),
            **options,
        )
