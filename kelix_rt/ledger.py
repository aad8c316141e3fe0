"""The ledger of device memory: lines of bytes, and what they leave room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from kelix_rt.errors import InputError

Stage: TypeAlias = Literal["encode", "generate", "render"]
Kind: TypeAlias = Literal["loaded", "transient"]


@dataclass(frozen=True)
class MemoryEntry:
    """One line of the ledger.

    stage: encode (image -> codes), generate (blocks) or render (codes -> image). kind: loaded is
    there from the start, transient at most while a step runs or an image is being drawn.
    """

    name: str
    num_bytes: int
    stage: Stage
    kind: Kind = "loaded"


@dataclass(frozen=True)
class MemoryPlan:
    """What a model needs. entries: weights and workspaces; the KV cache comes on top.

    kv_bytes_per_block: keys and values of one position in all layers. num_pages: KV pages of
    page_size positions, 0 for a model without a cache. max_positions: of the longest request.
    max_batch: requests in flight at most. free_bytes: what the plan was made for, if known.
    """

    entries: tuple[MemoryEntry, ...]
    dtype: torch.dtype
    kv_bytes_per_block: int = 0
    page_size: int = 0
    num_pages: int = 0
    max_positions: int = 0
    max_batch: int = 0
    free_bytes: int | None = None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.kv_bytes_per_block * self.page_size * self.num_pages

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return sum(entry.num_bytes for entry in self.entries) + self.kv_bytes

    def bytes_of(self, kind: Kind, stage: Stage | None = None) -> int:
        """Bytes of the loaded or the transient entries, of one stage or of all."""
        return sum(
            entry.num_bytes
            for entry in self.entries
            if entry.kind == kind and stage in (None, entry.stage)
        )

    def concurrency(self, positions: int | None = None) -> int:
        """Requests of `positions` blocks (None: the longest) that run at once without preemption.

        0 when not even one fits. Raises InputError below 1 position.
        """
        length = self.max_positions if positions is None else positions
        if length < 1:
            raise InputError(f"concurrency: positions must be at least 1, got {length}")
        return min(self.max_batch, self.num_pages // -(-length // self.page_size))

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) of every line, the KV cache and the total last; for printing."""
        lines = [(entry.name, entry.num_bytes) for entry in self.entries]
        if self.num_pages:
            name = f"KV cache ({self.num_pages} pages of {self.page_size} blocks)"
            lines.append((name, self.kv_bytes))
        return [*lines, ("total", self.total_bytes)]
