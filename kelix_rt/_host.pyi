"""Page pool and prefix cache of the paged KV cache (C++, csrc/host).

A page holds the keys and values of `page_size` consecutive rows (blocks) of one sequence. A page is
in exactly one state: free, used (held by at least one sequence) or cached (held by none, kept for
its content, taken back least recently used first when free pages run out).
`num_free + num_cached + num_used == num_pages`.

Rows are C-contiguous int64 arrays of shape [S, row_width] (row_width = N + 1 ids per block) and are
read in place. Sequences are positive ints that are never used twice.

Errors: ValueError for a bad argument, KeyError for a sequence that was never added or is already
released. A call that raises leaves the pool consistent. Not thread-safe without the GIL.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class PagePool:
    def __init__(
        self, num_pages: int, page_size: int, row_width: int, *, hash_bits: int = 64
    ) -> None:
        """`hash_bits` < 64 makes hashes collide (0: always); results must not depend on it."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def row_width(self) -> int: ...
    @property
    def num_free(self) -> int:
        """Pages with no owner and no content."""
    @property
    def num_cached(self) -> int:
        """Pages with no owner whose content can still be matched; counted as available."""
    @property
    def num_used(self) -> int:
        """Pages held by at least one sequence."""
    @property
    def num_available(self) -> int:
        """num_free + num_cached: what grow() can hand out right now."""
    @property
    def num_sequences(self) -> int: ...
    def match_prefix(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
        """Longest cached prefix of `rows`: (page ids, matched rows). Takes no reference.

        Only full pages match, and never the last row: it must be computed to predict the next.
        """

    def add(self, rows: NDArray[np.int64] | None = None) -> tuple[int, int]:
        """New sequence that holds the cached prefix of `rows`: (sequence, matched rows).

        Without rows it starts empty. Takes no free page; call grow() for the rest.
        """

    def grow(self, seq: int, num_rows: int) -> bool:
        """Make room for `num_rows` rows in all; False (nothing changed) when pages are short.

        Evicts cached pages when free ones run out. A smaller number than before is a no-op.
        """

    def commit(self, seq: int, rows: NDArray[np.int64]) -> int:
        """Register the full pages of `rows`, whose keys and values are now written.

        `rows` is the sequence from its first row; at most num_rows(seq) of them. Only pages not
        committed before are hashed. When an equal page is cached already, the sequence is switched
        to that one and its own is freed, so read page tables after the commits of a step.
        Returns the number of pages newly registered. ValueError if, where there are new ones, rows
        differ from those committed earlier. Does nothing after reset_cache().
        """

    def release(self, seq: int) -> None:
        """Drop the sequence: committed pages stay cached, the others become free."""

    def num_rows(self, seq: int) -> int:
        """Rows the sequence was matched or grown to."""

    def num_committed(self, seq: int) -> int:
        """Rows in committed pages, a multiple of page_size; 0 after reset_cache()."""

    def page_table(self, seq: int) -> NDArray[np.int32]:
        """The sequence's page ids in order, a copy."""

    def write_page_tables(self, seqs: Sequence[int], out: NDArray[np.int32]) -> None:
        """Write the page ids of seqs[b] to out[b], zeros elsewhere.

        `out` is C-contiguous int32 [B, max_pages] with B >= len(seqs); for pinned buffers.
        """

    def reset_cache(self) -> None:
        """Forget all cached content (new weights, say). Live sequences keep their pages, but these
        and later ones of theirs are never registered again."""

    def check(self) -> None:
        """RuntimeError if an internal invariant is broken. Walks all pages; for tests."""
