"""The arrays of a block step: names, types and shapes, and the bytes they take. No torch here."""

from __future__ import annotations

import numpy as np

from kelix_rt.speculation import DRAFT_ROWS

ALIGNMENT = 16
Sections = dict[str, tuple[type, tuple[int, ...]]]


def sections(width: int, tokens: int, spans: int, blocks: int, kept: int, pages: int) -> Sections:
    """Arrays of a step: `tokens` rows of `width` ids in `spans` spans, which yield `blocks` blocks.

    kept: rows whose hidden state is kept. pages: those of the longest request. carried: rows that
    the step before draws, and where they go.
    """
    return {
        "ids": (np.int64, (tokens, width)),
        "slots": (np.int64, (tokens,)),
        "block_rows": (np.int64, (blocks,)),
        "seeds": (np.int64, (blocks,)),
        "steps": (np.int64, (blocks,)),
        "keep_rows": (np.int64, (kept,)),
        "carried": (np.int64, (2, spans)),
        "positions": (np.int32, (tokens,)),
        "context_lens": (np.int32, (spans,)),
        "query_start": (np.int32, (spans + 1,)),
        "page_table": (np.int32, (spans, pages)),
        "params": (np.float32, (blocks, width, 4)),
    }


def aligned_bytes(dtype: type, shape: tuple[int, ...]) -> int:
    """Bytes of an array, rounded up so that the next one is aligned."""
    used = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-used // ALIGNMENT) * ALIGNMENT


def block_rows(max_batch: int) -> int:
    """Blocks that a step can yield: one of every request, and those behind drafts."""
    return max_batch + DRAFT_ROWS


def buffer_bytes(width: int, max_tokens: int, max_batch: int, pages: int) -> int:
    """Bytes of the largest step."""
    largest = sections(width, max_tokens, max_batch, block_rows(max_batch), max_tokens, pages)
    return sum(aligned_bytes(dtype, shape) for dtype, shape in largest.values())


def buckets(limit: int) -> tuple[int, ...]:
    """1, 2, 4, 8, ... and `limit`: the numbers of rows that recorded steps are padded to."""
    return (*(1 << power for power in range((limit - 1).bit_length())), limit)
