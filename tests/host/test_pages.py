"""PagePool: allocation, sharing, tables and the rejection of bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kelix_rt._host import PagePool

PAGE, WIDTH = 4, 3


def make_rows(count: int, first: int = 0) -> NDArray[np.int64]:
    """Rows [count, WIDTH], all different."""
    start = first * WIDTH
    return np.arange(start, start + count * WIDTH, dtype=np.int64).reshape(count, WIDTH)


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check()
    return pool.num_free, pool.num_cached, pool.num_used


def test_grow_takes_whole_pages_and_release_returns_them() -> None:
    pool = PagePool(5, PAGE, WIDTH)
    seq, matched = pool.add()
    assert matched == 0
    assert counts(pool) == (5, 0, 0)
    for num_rows, pages in [(0, 0), (1, 1), (4, 1), (5, 2), (2, 2), (17, 5), (20, 5)]:
        assert pool.grow(seq, num_rows)
        assert counts(pool) == (5 - pages, 0, pages)
    assert sorted(pool.page_table(seq).tolist()) == [0, 1, 2, 3, 4]
    assert pool.num_rows(seq) == 20
    pool.release(seq)
    assert counts(pool) == (5, 0, 0)
    assert pool.num_sequences == 0


def test_grow_is_all_or_nothing() -> None:
    pool = PagePool(3, PAGE, WIDTH)
    first, second = pool.add()[0], pool.add()[0]
    assert pool.grow(first, 2 * PAGE)
    assert not pool.grow(second, 2 * PAGE)
    assert counts(pool) == (1, 0, 2)
    assert pool.num_rows(second) == 0
    assert pool.grow(second, PAGE)
    assert not pool.grow(second, 2**63 - 1)


def test_write_page_tables_pads_with_zeros() -> None:
    pool = PagePool(8, PAGE, WIDTH)
    seqs = [pool.add()[0] for _ in range(2)]
    assert pool.grow(seqs[0], 3 * PAGE)
    assert pool.grow(seqs[1], 1)
    out = np.full((3, 4), -7, dtype=np.int32)
    pool.write_page_tables(seqs, out)
    assert out[0].tolist() == [*pool.page_table(seqs[0]).tolist(), 0]
    assert out[1].tolist() == [*pool.page_table(seqs[1]).tolist(), 0, 0, 0]
    assert out[2].tolist() == [0, 0, 0, 0]


def test_page_table_is_a_copy() -> None:
    pool = PagePool(2, PAGE, WIDTH)
    seq, _ = pool.add()
    assert pool.grow(seq, 8)
    table = pool.page_table(seq)
    assert table.dtype == np.int32
    table[:] = -1
    assert sorted(pool.page_table(seq).tolist()) == [0, 1]


def test_sequences_are_never_used_twice() -> None:
    pool = PagePool(1, PAGE, WIDTH)
    first, _ = pool.add()
    pool.release(first)
    assert pool.add()[0] != first


UNKNOWN_CALLS: list[Callable[[PagePool, int], object]] = [
    lambda pool, seq: pool.grow(seq, 1),
    lambda pool, seq: pool.commit(seq, make_rows(1)),
    lambda pool, seq: pool.release(seq),
    lambda pool, seq: pool.num_rows(seq),
    lambda pool, seq: pool.num_committed(seq),
    lambda pool, seq: pool.page_table(seq),
    lambda pool, seq: pool.write_page_tables([seq], np.zeros((1, 1), np.int32)),
]


@pytest.mark.parametrize("call", UNKNOWN_CALLS)
def test_unknown_and_released_sequences_raise(call: Callable[[PagePool, int], object]) -> None:
    pool = PagePool(2, PAGE, WIDTH)
    seq, _ = pool.add()
    pool.release(seq)
    for unknown in (seq, seq + 1, -1, 0):
        with pytest.raises(KeyError, match=f"no sequence {unknown}"):
            call(pool, unknown)
    assert counts(pool) == (2, 0, 0)


@pytest.mark.parametrize("field", ["num_pages", "page_size", "row_width"])
@pytest.mark.parametrize("value", [0, -1, 2**62])
def test_impossible_sizes_are_rejected(field: str, value: int) -> None:
    sizes = {"num_pages": 2, "page_size": PAGE, "row_width": WIDTH, field: value}
    with pytest.raises(ValueError, match=field):
        PagePool(**sizes)


@pytest.mark.parametrize("hash_bits", [-1, 65])
def test_impossible_hash_bits_are_rejected(hash_bits: int) -> None:
    with pytest.raises(ValueError, match="hash_bits"):
        PagePool(2, PAGE, WIDTH, hash_bits=hash_bits)


def test_bad_row_numbers_are_rejected() -> None:
    pool = PagePool(4, PAGE, WIDTH)
    seq, _ = pool.add()
    assert pool.grow(seq, 6)
    with pytest.raises(ValueError, match="grow: num_rows must be >= 0, got -1"):
        pool.grow(seq, -1)
    assert counts(pool) == (2, 0, 2)


BAD_ROWS = {
    "dtype": make_rows(4).astype(np.int32),
    "unsigned": make_rows(4).astype(np.uint64),
    "swapped": make_rows(4).astype(np.dtype(np.int64).newbyteorder()),
    "one dimension": make_rows(4).ravel(),
    "three dimensions": make_rows(4)[None],
    "narrow": np.zeros((4, WIDTH - 1), np.int64),
    "strided": make_rows(8)[::2],
    "transposed": np.zeros((WIDTH, 4), np.int64).T,
    "unaligned": np.zeros(4 * WIDTH * 8 + 1, np.uint8)[1:].view(np.int64).reshape(4, WIDTH),
}


@pytest.mark.parametrize("rows", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_rejected(rows: NDArray[np.int64]) -> None:
    pool = PagePool(4, PAGE, WIDTH)
    seq, _ = pool.add()
    assert pool.grow(seq, 8)
    for call in (pool.match_prefix, pool.add, lambda bad: pool.commit(seq, bad)):
        with pytest.raises(ValueError, match="rows must"):
            call(rows)
    assert pool.num_sequences == 1
    assert counts(pool) == (2, 0, 2)


def test_bad_outputs_are_rejected() -> None:
    pool = PagePool(4, PAGE, WIDTH)
    seq, _ = pool.add()
    assert pool.grow(seq, 2 * PAGE)
    read_only = np.zeros((1, 2), np.int32)
    read_only.flags.writeable = False
    bad: list[NDArray[Any]] = [
        np.zeros((1, 2), np.int64),
        np.zeros(2, np.int32),
        np.zeros((0, 2), np.int32),
        np.zeros((1, 1), np.int32),
        np.zeros((1, 4), np.int32)[:, ::2],
        read_only,
    ]
    for out in bad:
        with pytest.raises(ValueError, match=r"out|writeable"):
            pool.write_page_tables([seq], out)


def test_wrong_types_are_rejected() -> None:
    pool = PagePool(4, PAGE, WIDTH)
    with pytest.raises(TypeError):
        pool.match_prefix([[1, 2, 3]])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        pool.grow("1", 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        pool.grow(1, 2**64)
