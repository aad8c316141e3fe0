"""From paths and options to the parts of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kelix_rt.checkpoint import resolve
from kelix_rt.config import EngineConfig, KelixConfig, read_config
from kelix_rt.devices import choose_device, choose_dtype
from kelix_rt.errors import ConfigError
from kelix_rt.host import PagePool
from kelix_rt.memory import available_bytes, choose_pages
from kelix_rt.models.language_model import KelixLM
from kelix_rt.runner import Runner
from kelix_rt.scheduler import Scheduler
from kelix_rt.stages.render import RenderStage
from kelix_rt.weights import OnTensor
from kelix_rt.workspace import language_workspaces, max_positions, render_workspaces


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    directory: Path
    runner: Runner
    scheduler: Scheduler
    options: EngineConfig
    max_positions: int
    drawing: tuple[Path, Path] | None = None  # the directories of DiT and autoencoder


def load_parts(
    model: str | Path,
    dit: str | Path | None,
    vae: str | Path | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    options: Mapping[str, Any],
    on_tensor: OnTensor | None = None,
) -> Parts:
    """Loads the models and books the KV cache; arguments as `Engine.from_pretrained`."""
    chosen = EngineConfig.from_json(options)
    directory = resolve(model)
    config = read_config(directory)
    if not isinstance(config, KelixConfig):
        raise ConfigError(
            f"Engine: {directory} must hold a Kelix language model, got a {type(config).__name__}"
        )
    target, wanted = choose_device(device), choose_dtype(dtype)
    language = KelixLM.from_pretrained(directory, target, wanted, on_tensor, chosen.quantization)
    drawing = find_drawing(directory, dit, vae, chosen.drawing)
    render = None
    if drawing is not None:
        # The release runs all of its models in one dtype, the language model's.
        render = _load_render(drawing, target, language, chosen, on_tensor)
    return replace(assemble(directory, language, render, chosen), drawing=drawing)


def assemble(
    directory: Path, language: KelixLM, render: RenderStage | None, options: EngineConfig
) -> Parts:
    """Books the KV cache in what memory is left, puts the parts together and records graphs."""
    config, options = language.config, options.on_device(language.device.type)
    needs = language_workspaces(config, options, language.dtype)
    if render is not None:
        needs += render_workspaces(render.dit.config, render.vae.config, options, language.dtype)
    positions = max_positions(config, options)
    free = available_bytes(language.device) - sum(need.num_bytes for need in needs)
    pages = choose_pages(config, options, language.dtype, max(free, 0))
    pool = PagePool(pages, options.page_size, config.num_codes + 1)
    scheduler = Scheduler(
        pool,
        max_batch=options.max_batch,
        max_step_tokens=options.max_step_tokens,
        prefix_cache=options.prefix_cache,
    )
    runner = Runner(language, pool, options, max_positions=positions, render=render)
    runner.capture_graphs()
    return Parts(directory, runner, scheduler, options, positions)


def _load_render(
    drawing: tuple[Path, Path],
    device: torch.device,
    language: KelixLM,
    options: EngineConfig,
    on_tensor: OnTensor | None,
) -> RenderStage:
    dit, vae = drawing
    render = RenderStage.from_pretrained(
        dit,
        vae,
        device,
        language.dtype,
        options.max_condition_length,
        options.max_drawn_pixels,
        on_tensor,
    )
    channels, width = render.dit.condition_channels, language.config.qwen_config.embed_dim
    if channels != width:
        raise ConfigError(
            f"dit: {dit} reads conditions of {channels} channels, but the language model's "
            f"embed_dim is {width}; they do not belong together"
        )
    if device.type == "cuda":
        _ = render.vae.module  # it takes its memory before the pages take the rest
    return render


def find_drawing(
    directory: Path | None, dit: str | Path | None, vae: str | Path | None, wanted: bool = True
) -> tuple[Path, Path] | None:
    """The directories of DiT and autoencoder: those given, else subfolders that exist, else None.

    A given directory without a config of its own may be a whole pipeline with such a subfolder.
    wanted: False looks for none. Raises ConfigError where a given one holds neither or is not
    wanted, or is given and the other not found.
    """
    if not wanted:
        if dit is not None or vae is not None:
            raise ConfigError("drawing=False leaves DiT and VAE out, but dit= or vae= is given")
        return None
    dit_path, vae_path = _part(directory, "dit", dit), _part(directory, "vae", vae)
    if dit_path is not None and vae_path is not None:
        return dit_path, vae_path
    if dit_path is None and vae_path is None:
        return None
    if dit is None and vae is None:
        return None  # the release bundles a DiT, and leaves the autoencoder to another repository
    missing = "dit" if dit_path is None else "vae"
    raise ConfigError(f"drawing needs both the DiT and its VAE, but there is no {missing}=")


def _part(directory: Path | None, name: str, given: str | Path | None) -> Path | None:
    path = directory if given is None else resolve(given, part=name)
    if path is None:
        return None
    if given is None or not (path / "config.json").is_file():
        path = path / name
    if path.is_dir():
        return path
    if given is not None:
        raise ConfigError(f"{name}={given}: holds no config.json and no subfolder {name}/")
    return None
