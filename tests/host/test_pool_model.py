"""The pool driven as a scheduler would, in random order, against a model.

The model keeps, for every page, the rows last written to it. Whatever the pool claims about a page
(a match, a shared page, a page switched at commit) is compared with those rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from numpy.typing import NDArray

from kelix_rt._host import PagePool

PAGE, WIDTH = 4, 3


@dataclass
class Running:
    """A live sequence of the model: its prompt, rows written so far, and those committed."""

    rows: list[tuple[int, ...]]
    written: int
    cacheable: bool = True


def as_array(rows: list[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.array(rows, dtype=np.int64).reshape(-1, WIDTH)


# Few different rows, so that prefixes often agree and often part within a page.
ROW = st.integers(0, 1).map(lambda i: (i,) * WIDTH)
PAGE_OF_ROWS = st.sampled_from([[(0,) * WIDTH] * PAGE, [(1,) * WIDTH] * PAGE])
PROMPT = st.tuples(st.lists(PAGE_OF_ROWS, max_size=3), st.lists(ROW, max_size=PAGE)).map(
    lambda parts: [row for page in parts[0] for row in page] + parts[1]
)


class PoolMachine(RuleBasedStateMachine):
    """Drives a pool as a scheduler would and checks each claim against the rows in the pages."""

    sequences: Bundle[int] = Bundle("sequences")

    @initialize(num_pages=st.integers(1, 10), hash_bits=st.sampled_from([0, 1, 64]))
    def start(self, num_pages: int, hash_bits: int) -> None:
        self.pool = PagePool(num_pages, PAGE, WIDTH, hash_bits=hash_bits)
        self.memory: list[list[tuple[int, ...] | None]] = [[None] * PAGE for _ in range(num_pages)]
        self.running: dict[int, Running] = {}

    def write(self, seq: int, stop: int) -> None:
        """Write the sequence's rows up to `stop`, as the model's forward pass would."""
        state = self.running[seq]
        table = self.pool.page_table(seq).tolist()
        others = {p for s in self.running if s != seq for p in self.pool.page_table(s).tolist()}
        for row in range(state.written, stop):
            page, offset = table[row // PAGE], row % PAGE
            assert page not in others, "a page has two writers"
            self.memory[page][offset] = state.rows[row]
        state.written = max(state.written, stop)

    def admit(self, rows: list[tuple[int, ...]]) -> int:
        before = self.pool.match_prefix(as_array(rows))
        seq, matched = self.pool.add(as_array(rows))
        assert matched == before[1]
        assert matched <= max(len(rows) - 1, 0)
        assert matched % PAGE == 0
        assert self.pool.page_table(seq).tolist() == before[0].tolist()
        self.running[seq] = Running(rows, matched)
        return seq

    @rule(target=sequences, rows=PROMPT)
    def add(self, rows: list[tuple[int, ...]]) -> int:
        return self.admit(rows)

    @rule(seq=sequences, extra=st.lists(ROW, max_size=2 * PAGE), commit=st.booleans())
    def step(self, seq: int, extra: list[tuple[int, ...]], commit: bool) -> None:
        """Grow by some rows and write them; commit now, as a decode step does, or later."""
        state = self.running[seq]
        rows = state.rows + extra
        held, available = len(self.pool.page_table(seq)), self.pool.num_available
        needed = max(0, -(-len(rows) // PAGE) - held)
        assert self.pool.grow(seq, len(rows)) == (needed <= available)
        if needed > available:
            assert len(self.pool.page_table(seq)) == held
            assert self.pool.num_available == available
            return
        state.rows = rows
        self.write(seq, len(rows))
        if commit:
            self.commit(seq)

    @rule(seq=sequences)
    def commit(self, seq: int) -> None:
        state = self.running[seq]
        self.pool.commit(seq, as_array(state.rows[: state.written]))
        full = state.written // PAGE * PAGE
        assert self.pool.num_committed(seq) == (full if state.cacheable else 0)
        if state.cacheable:
            probe = as_array([*state.rows[:full], (0,) * WIDTH])
            pages, matched = self.pool.match_prefix(probe)
            assert matched == full
            assert pages.tolist() == self.pool.page_table(seq).tolist()[: full // PAGE]

    @rule(seq=consumes(sequences))
    def release(self, seq: int) -> None:
        self.pool.release(seq)
        del self.running[seq]
        with pytest.raises(KeyError):
            self.pool.release(seq)

    @rule(target=sequences, seq=consumes(sequences))
    def preempt(self, seq: int) -> int:
        """Release, then come back: with nothing evicted in between, committed pages are found."""
        state = self.running.pop(seq)
        committed = self.pool.num_committed(seq)
        self.pool.release(seq)
        again = self.admit(state.rows)
        assert self.running[again].written >= min(
            committed, max(len(state.rows) - 1, 0) // PAGE * PAGE
        )
        return again

    @rule()
    def evict_everything(self) -> None:
        """One sequence takes every page that is not in use."""
        hog, _ = self.pool.add()
        available = self.pool.num_available
        assert self.pool.grow(hog, available * PAGE)
        assert self.pool.num_available == self.pool.num_cached == 0
        for page in self.pool.page_table(hog).tolist():
            self.memory[page] = [None] * PAGE
        self.pool.release(hog)
        assert self.pool.num_free == available

    @rule()
    def reset_cache(self) -> None:
        self.pool.reset_cache()
        assert self.pool.num_cached == 0
        for state in self.running.values():
            state.cacheable = False

    @invariant()
    def pool_is_sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.num_sequences == len(self.running)
            held = {p for s in self.running for p in self.pool.page_table(s).tolist()}
            assert self.pool.num_used == len(held)
            total = self.pool.num_free + self.pool.num_cached + self.pool.num_used
            assert total == self.pool.num_pages

    @invariant()
    def pages_hold_the_rows_they_should(self) -> None:
        for seq, state in getattr(self, "running", {}).items():
            table = self.pool.page_table(seq).tolist()
            stored = [self.memory[table[row // PAGE]][row % PAGE] for row in range(state.written)]
            assert stored == state.rows[: state.written]


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
