"""Codes of images seen before, found by the content of their patches."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

DIGEST_BYTES = 16


def content_key(pixel_values: Tensor, grid: Tensor) -> bytes:
    """A digest of patches [P, C, p, p] and grid [1, 3]: equal for equal values of one dtype."""
    shape = f"{pixel_values.dtype} {list(pixel_values.shape)} {grid.tolist()}"
    digest = hashlib.blake2b(shape.encode(), digest_size=DIGEST_BYTES)
    digest.update(pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


class CodeCache:
    """Codes of single images, the least recently used thrown away above `max_bytes`.

    hits, misses: what `get` answered. Codes are kept as int32 on the CPU and given out as int64.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = self.misses = 0
        self._codes: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._codes)

    def clear(self) -> None:
        """Forgets all codes; the counts of hits and misses stay."""
        self._codes.clear()
        self.num_bytes = 0

    def get(self, key: bytes) -> Tensor | None:
        """The codes int64 [T, N] of an image, or None; counts as its last use."""
        found = self._codes.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._codes.move_to_end(key)
        return found.long()

    def put(self, key: bytes, codes: Tensor) -> None:
        """Keeps codes [T, N] of an image, if they alone do not exceed the budget."""
        kept = codes.to(device="cpu", dtype=torch.int32)
        if kept.nbytes > self.max_bytes or key in self._codes:
            return
        self._codes[key] = kept
        self.num_bytes += kept.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._codes.popitem(last=False)
            self.num_bytes -= oldest.nbytes
