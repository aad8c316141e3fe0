"""An engine that knows what it was made of: plan, load, tokenizer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kelix_rt.config import EngineConfig, KelixConfig
from kelix_rt.core import EngineCore
from kelix_rt.ledger import MemoryPlan
from kelix_rt.loading import choose_device, choose_dtype, load_parts
from kelix_rt.memory import available_bytes
from kelix_rt.planning import engine_plan
from kelix_rt.processing import TextTokenizer
from kelix_rt.processing.text import TOKENIZER_FILES
from kelix_rt.speculation import marker_drafter
from kelix_rt.weights import OnTensor

if TYPE_CHECKING:
    from typing_extensions import Self


class LoadedEngine(EngineCore):
    """The core of an engine whose parts come from checkpoint directories."""

    directory: Path

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dit: str | Path | None = None,
        vae: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        on_tensor: OnTensor | None = None,
        **options: Any,
    ) -> Self:
        """Loads a Kelix checkpoint: a local directory or a hub id.

        dit, vae: the image DiT and its autoencoder; subfolders dit/ and vae/ of the model are
        found without. Both are needed for drawing only. device: "auto" takes a GPU when there is
        one. dtype: "auto" keeps what the language model stores, for all parts; or "bfloat16",
        "float16", "float32". on_tensor: called with (name, bytes) after each tensor, for progress.
        options: the fields of EngineConfig. Raises ConfigError, WeightError, CapacityError or
        NativeError.
        """
        parts = load_parts(model, dit, vae, device, dtype, options, on_tensor)
        engine = cls(parts.runner, parts.scheduler, parts.options, parts.max_positions)
        engine.directory = parts.directory
        if engine.has_text:
            engine.scheduler.drafter = marker_drafter(
                engine.config, engine.options, lambda: engine.text
            )
        return engine

    @staticmethod
    def plan(
        model: str | Path | KelixConfig,
        options: EngineConfig | None = None,
        *,
        dit: str | Path | None = None,
        vae: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        free_bytes: int | None = None,
    ) -> MemoryPlan:
        """The memory that an engine of these arguments takes, before any weight is read.

        model: a local directory, kelix-tiny or a config alone; the other arguments are those of
        `from_pretrained`. free_bytes: None takes what the device has free. The plan tells bytes by
        stage and how many requests run at once. Raises as `kelix_rt.planning.engine_plan`.
        """
        free = available_bytes(choose_device(device)) if free_bytes is None else free_bytes
        wanted = choose_dtype(dtype)
        return engine_plan(model, options, dit=dit, vae=vae, dtype=wanted, free_bytes=free)

    @cached_property
    def has_text(self) -> bool:
        """Whether the checkpoint's directory holds a tokenizer."""
        return any((self.directory / name).is_file() for name in TOKENIZER_FILES)

    @cached_property
    def text(self) -> TextTokenizer:
        """The checkpoint's tokenizer. ConfigError when its directory holds none."""
        return TextTokenizer.from_pretrained(
            self.directory, self.options.trust_remote_code, self.config.qwen_config.vocab_size
        )
