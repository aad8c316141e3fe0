"""From paths and options to the parts of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kelix_rt._host import PagePool
from kelix_rt.checkpoint import resolve
from kelix_rt.config import EngineConfig, KelixConfig, read_config
from kelix_rt.errors import ConfigError
from kelix_rt.memory import available_bytes, choose_pages, max_positions
from kelix_rt.models.language_model import KelixLM
from kelix_rt.runner import Runner
from kelix_rt.scheduler import Scheduler
from kelix_rt.weights import OnTensor

if TYPE_CHECKING:
    from kelix_rt.stages.render import RenderStage

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    directory: Path
    runner: Runner
    scheduler: Scheduler
    options: EngineConfig
    max_positions: int


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
    language = KelixLM.from_pretrained(directory, target, wanted, on_tensor)
    dit_path, vae_path = find_drawing(directory, dit, vae)
    render = None
    if dit_path is not None and vae_path is not None:
        from kelix_rt.stages.render import RenderStage  # brings diffusers, which is slow to import

        # The release runs all of its models in one dtype, the language model's.
        render = RenderStage.from_pretrained(
            dit_path, vae_path, target, language.dtype, chosen.max_condition_length, on_tensor
        )
        channels = render.dit.condition_channels
        if channels != config.qwen_config.embed_dim:
            raise ConfigError(
                f"dit: {dit_path} reads conditions of {channels} channels, but the language "
                f"model's embed_dim is {config.qwen_config.embed_dim}; they do not belong together"
            )
    return assemble(directory, language, render, chosen)


def assemble(
    directory: Path, language: KelixLM, render: RenderStage | None, options: EngineConfig
) -> Parts:
    """Books the KV cache in what memory is left, and puts the parts together."""
    config = language.config
    positions = max_positions(config, options)
    pages = choose_pages(config, options, language.dtype, available_bytes(language.device))
    pool = PagePool(pages, options.page_size, config.num_codes + 1)
    scheduler = Scheduler(
        pool,
        max_batch=options.max_batch,
        max_step_tokens=options.max_step_tokens,
        prefix_cache=options.prefix_cache,
    )
    runner = Runner(language, pool, options, max_positions=positions, render=render)
    return Parts(directory, runner, scheduler, options, positions)


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: {device!r} is not a device: {error}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} needs a GPU and a torch built for it; use 'cpu'")
    return chosen


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto": what the checkpoint stores."""
    if dtype == "auto":
        return None
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def find_drawing(
    directory: Path, dit: str | Path | None, vae: str | Path | None
) -> tuple[Path | None, Path | None]:
    """The directories of DiT and autoencoder: those given, else subfolders that exist.

    A given directory without a config of its own may be a whole pipeline with such a subfolder.
    """
    found = []
    for name, given in (("dit", dit), ("vae", vae)):
        path = directory if given is None else resolve(given)
        inner = given is None or not (path / "config.json").is_file()
        found.append(path / name if inner else path)
    dit_path, vae_path = (path if path.is_dir() else None for path in found)
    if (dit_path is None) != (vae_path is None):
        missing = "dit" if dit_path is None else "vae"
        raise ConfigError(f"drawing needs both the DiT and its VAE, but there is no {missing}=")
    return dit_path, vae_path
