"""An engine that knows what it was made of: plan, load, sleep and wake, tokenizer."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from kelix_rt.config import EngineConfig, KelixConfig
from kelix_rt.core import EngineCore
from kelix_rt.devices import choose_device, choose_dtype
from kelix_rt.errors import ConfigError, KelixError
from kelix_rt.ledger import MemoryPlan
from kelix_rt.loading import load_parts
from kelix_rt.memory import available_bytes
from kelix_rt.planning import engine_plan
from kelix_rt.processing import TextTokenizer
from kelix_rt.processing.text import TOKENIZER_FILES
from kelix_rt.speculation import marker_drafter
from kelix_rt.weights import OnTensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class _Source:
    """What an engine was loaded with, to do it again."""

    drawing: tuple[Path, Path] | None
    device: torch.device
    dtype: torch.dtype
    options: dict[str, Any]


class LoadedEngine(EngineCore):
    """The core of an engine whose parts come from checkpoint directories.

    directory: the language model's; None where the parts were made otherwise.
    """

    directory: Path | None = None
    _source: _Source

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
        engine._source = _Source(parts.drawing, parts.runner.device, parts.runner.dtype, options)
        engine._set_drafter()
        return engine

    def sleep(self, weights: Literal["auto", "host", "disk"] = "auto") -> None:
        """Gives the memory of weights and KV cache back until `wake`; does nothing when asleep.

        weights: "host" keeps a copy in main memory, "disk" reads the checkpoint again; "auto" is
        host on a GPU and disk on a CPU, where a copy would free nothing. Cached prefixes are lost,
        codes of images are not. Calls that need a model raise AsleepError meanwhile. Raises
        KelixError while requests are unfinished, ConfigError for "host" on a CPU.
        """
        if weights not in ("auto", "host", "disk"):
            raise ConfigError(f"sleep: weights must be 'auto', 'host' or 'disk', got {weights!r}")
        if self.is_asleep:
            return
        if self.has_work:
            raise KelixError(
                "sleep: requests are unfinished or have events nobody read; run step() until "
                "has_work is False, or abort them"
            )
        runner = self.runner
        on_gpu = runner.device.type != "cpu"
        if weights == "disk" or not on_gpu:
            _ = self._files  # to be read again
        if weights == "host" and not on_gpu:
            raise ConfigError(
                "sleep: weights='host' frees nothing on a CPU, where they are already; use 'disk'"
            )
        if weights == "host" or (weights == "auto" and on_gpu):
            self._offloaded = runner.offload()
            self.scheduler.pool.reset_cache()
        else:
            self.counts.head_escapes += runner.generate.head_escapes
            self._runner = None
        del runner
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Takes the memory again after `sleep`; does nothing when awake.

        Requests give the blocks they would have given without. Raises CapacityError or torch's
        OutOfMemoryError where the memory is gone, WeightError where the checkpoint is; the engine
        then sleeps on.
        """
        if self._offloaded is not None:
            assert self._runner is not None
            try:
                self._offloaded.restore()
                self._runner.capture_graphs()
            except BaseException:
                self._runner.forget_graphs()  # they know addresses that are given back now
                self._offloaded.free()
                raise
            self._offloaded = None
        elif self._runner is None:
            self._load_again()

    @property
    def is_asleep(self) -> bool:
        """Whether `sleep` was called and `wake` was not."""
        return self._runner is None or self._offloaded is not None

    def _load_again(self) -> None:
        source, pages = self._source, self.scheduler.pool.num_pages
        dit, vae = source.drawing or (None, None)
        parts = load_parts(
            self._files,
            dit,
            vae,
            source.device,
            source.dtype,
            {**source.options, "num_pages": pages},
        )
        if parts.runner.encode is not None and self.image_cache is not None:
            parts.runner.encode.cache = self.image_cache
        parts.runner.graph_counts.add(self.graph_counts)
        self.graph_counts = parts.runner.graph_counts
        self._runner, self.scheduler = parts.runner, parts.scheduler
        self._set_drafter()

    def _set_drafter(self) -> None:
        if self.has_text:
            self.scheduler.drafter = marker_drafter(self.config, self.options, lambda: self.text)

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
        target, wanted = choose_device(device, kernels=False), choose_dtype(dtype)
        free = available_bytes(target) if free_bytes is None else free_bytes
        options = (options or EngineConfig()).on_device(target.type)
        return engine_plan(model, options, dit=dit, vae=vae, dtype=wanted, free_bytes=free)

    @property
    def _files(self) -> Path:
        if self.directory is None:
            raise ConfigError(
                "Engine: it was made without a checkpoint, whose tokenizer and configs it lacks; "
                "make one with Engine.from_pretrained"
            )
        return self.directory

    @cached_property
    def has_text(self) -> bool:
        """Whether the checkpoint's directory holds a tokenizer."""
        found = self.directory
        return found is not None and any((found / name).is_file() for name in TOKENIZER_FILES)

    @cached_property
    def text(self) -> TextTokenizer:
        """The checkpoint's tokenizer. ConfigError when its directory holds none."""
        return TextTokenizer.from_pretrained(
            self._files, self.options.trust_remote_code, self.config.qwen_config.vocab_size
        )
