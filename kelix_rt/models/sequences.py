"""Where the positions of a call belong: a step over the paged cache, or whole packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kelix_rt.config import QwenConfig


@dataclass(frozen=True)
class StepContext:
    """Where the T positions of one step belong: B requests laid end to end.

    positions: [T] int32 position in the request. slots: [T] int64 flat cache slot, ``page id *
    page_size + offset``, -1 to store nothing. page_table: [B, max_pages] int32. context_lens: [B]
    int32 tokens of each request once this step is stored. query_start: [B + 1] int32 first row.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    context_lens: Tensor
    query_start: Tensor

    @classmethod
    def of_chunks(
        cls,
        pages: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> StepContext:
        """Context of one chunk per request: positions ``start .. start + count`` over its pages."""
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        for own, start, count in zip(pages, starts, counts, strict=True):
            chunk = range(start, start + count)
            positions.extend(chunk)
            slots.extend(own[p // page_size] * page_size + p % page_size for p in chunk)
            query_start.append(len(positions))
        width = max(map(len, pages), default=0)
        table = [[*own, *[0] * (width - len(own))] for own in pages]
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        return cls(
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            page_table=torch.tensor(table, dtype=torch.int32, device=device),
            context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_start=torch.tensor(query_start, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of all layers, each [L, pages, KV heads, page_size, head_dim]."""

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(
        cls,
        config: QwenConfig,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PagedKV:
        """A cache of num_pages pages of page_size positions.

        dtype: the hidden states' or float8_e4m3fn.
        Not initialised: nothing reads what no sequence wrote, and on a CPU a page takes real
        memory only once it is used.
        """
        shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
        k = torch.empty(shape, dtype=dtype, device=device)
        return cls(k, torch.empty_like(k))

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return self.k.shape[3]
