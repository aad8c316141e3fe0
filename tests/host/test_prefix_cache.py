"""Prefix cache: matching, sharing, eviction order and hash collisions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kelix_rt._host import PagePool

PAGE, WIDTH = 4, 3


def make_rows(*pages: int, extra: int = 0) -> NDArray[np.int64]:
    """A full page of rows for each number, then `extra` rows; equal numbers give equal rows."""
    numbers = [1000 * page + row for page in pages for row in range(PAGE)]
    numbers += [-1 - row for row in range(extra)]
    return np.repeat(np.array(numbers, dtype=np.int64)[:, None], WIDTH, axis=1)


def run(pool: PagePool, rows: NDArray[np.int64]) -> int:
    """Add a sequence, make room for all rows and commit them."""
    seq, _ = pool.add(rows)
    assert pool.grow(seq, len(rows))
    pool.commit(seq, rows)
    pool.check()
    return seq


def test_match_is_in_full_pages_and_leaves_a_row_to_compute() -> None:
    pool = PagePool(8, PAGE, WIDTH)
    rows = make_rows(1, 2, 3)
    seq = run(pool, rows)
    table = pool.page_table(seq).tolist()
    for num_rows, pages in [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2)]:
        found, matched = pool.match_prefix(rows[:num_rows])
        assert (found.tolist(), matched) == (table[:pages], pages * PAGE)
        assert found.dtype == np.int32
    assert pool.match_prefix(make_rows(1, 2, 3, extra=1))[1] == 12
    assert pool.match_prefix(make_rows(1, 9, 3, extra=1))[1] == 4
    assert pool.match_prefix(make_rows(2, 3, extra=1))[1] == 0


def test_a_released_sequence_is_found_again() -> None:
    pool = PagePool(8, PAGE, WIDTH)
    rows = make_rows(1, 2, extra=2)
    seq = run(pool, rows)
    table = pool.page_table(seq).tolist()
    pool.release(seq)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 2, 0)
    again, matched = pool.add(rows)
    assert matched == 2 * PAGE
    assert pool.num_rows(again) == pool.num_committed(again) == 2 * PAGE
    assert pool.page_table(again).tolist() == table[:2]
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 0, 2)


def test_rows_count_only_once_committed() -> None:
    pool = PagePool(8, PAGE, WIDTH)
    rows = make_rows(1, 2, extra=1)
    seq, _ = pool.add(rows)
    assert pool.grow(seq, len(rows))
    assert pool.match_prefix(rows)[1] == 0
    assert pool.commit(seq, rows[:3]) == 0
    assert pool.commit(seq, rows[:5]) == 1
    assert pool.match_prefix(rows)[1] == PAGE
    assert pool.commit(seq, rows) == 1
    assert pool.commit(seq, rows) == 0
    assert pool.num_committed(seq) == 2 * PAGE


def test_equal_pages_after_different_prefixes_stay_apart() -> None:
    pool = PagePool(8, PAGE, WIDTH, hash_bits=0)
    first, second = run(pool, make_rows(1, 7)), run(pool, make_rows(2, 7))
    assert pool.page_table(first)[1] != pool.page_table(second)[1]
    found, _ = pool.match_prefix(make_rows(2, 7, extra=1))
    assert found.tolist() == pool.page_table(second).tolist()


@pytest.mark.parametrize("column", range(WIDTH))
@pytest.mark.parametrize("row", range(PAGE))
def test_every_id_decides_even_when_all_hashes_collide(row: int, column: int) -> None:
    for hash_bits in (0, 64):
        pool = PagePool(8, PAGE, WIDTH, hash_bits=hash_bits)
        rows = make_rows(1, extra=1)
        run(pool, rows)
        other = rows.copy()
        other[row, column] += 1 << 40
        assert pool.match_prefix(other)[1] == 0
        assert pool.match_prefix(rows)[1] == PAGE


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    pool = PagePool(5, PAGE, WIDTH)
    old, new = make_rows(1, 2, 3), make_rows(8, 9)
    for rows in (old, new):
        pool.release(run(pool, rows))
    old_then_one_more, new_then_one_more = make_rows(1, 2, 3, extra=1), make_rows(8, 9, extra=1)
    matched = []
    seq, _ = pool.add()
    for pages in range(1, 6):
        assert pool.grow(seq, pages * PAGE)
        pool.check()
        matched.append(
            tuple(pool.match_prefix(r)[1] // PAGE for r in (old_then_one_more, new_then_one_more))
        )
    assert matched == [(2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]


def test_use_renews_a_cached_prefix() -> None:
    pool = PagePool(4, PAGE, WIDTH)
    first, second = make_rows(1, 2, extra=1), make_rows(8, 9, extra=1)
    for rows in (first, second):
        pool.release(run(pool, rows[:-1]))
    pool.release(pool.add(first)[0])
    seq, _ = pool.add()
    assert pool.grow(seq, 2 * PAGE)
    assert pool.match_prefix(first)[1] == 2 * PAGE
    assert pool.match_prefix(second)[1] == 0


def test_pages_in_use_are_never_evicted() -> None:
    pool = PagePool(4, PAGE, WIDTH)
    rows = make_rows(1, 2, extra=1)
    run(pool, rows[:-1])
    seq, _ = pool.add()
    assert not pool.grow(seq, 3 * PAGE)
    assert pool.grow(seq, 2 * PAGE)
    assert pool.match_prefix(rows)[1] == 2 * PAGE


def test_commit_switches_to_the_page_already_cached() -> None:
    pool = PagePool(8, PAGE, WIDTH)
    rows = make_rows(1, 2)
    twins = [pool.add(rows)[0], pool.add(rows)[0]]
    for seq in twins:
        assert pool.grow(seq, len(rows))
    assert pool.commit(twins[0], rows) == 2
    assert pool.num_used == 4
    assert pool.commit(twins[1], rows) == 0
    pool.check()
    assert pool.num_used == 2
    assert pool.page_table(twins[0]).tolist() == pool.page_table(twins[1]).tolist()
    pool.release(twins[0])
    pool.check()
    assert (pool.num_cached, pool.num_used) == (0, 2)


def test_commit_of_other_rows_is_rejected() -> None:
    pool = PagePool(8, PAGE, WIDTH)
    seq = run(pool, make_rows(1, 2))
    with pytest.raises(ValueError, match="exceed"):
        pool.commit(seq, make_rows(1, 2, extra=1))
    with pytest.raises(ValueError, match="at least the 8 committed"):
        pool.commit(seq, make_rows(1))
    assert pool.grow(seq, 3 * PAGE)
    with pytest.raises(ValueError, match="page 0 differ"):
        pool.commit(seq, make_rows(9, 2, 3))
    assert pool.commit(seq, make_rows(1, 2, 3)) == 1
    pool.check()


def test_reset_cache_forgets_content_but_not_owners() -> None:
    pool = PagePool(8, PAGE, WIDTH)
    rows, idle = make_rows(1, 2), make_rows(8)
    seq = run(pool, rows)
    pool.release(run(pool, idle))
    pool.reset_cache()
    pool.check()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 0, 2)
    assert pool.match_prefix(make_rows(1, 2, extra=1))[1] == 0
    # Its keys and values may be stale, so nothing of it enters the cache again.
    assert pool.grow(seq, 3 * PAGE)
    assert pool.commit(seq, make_rows(1, 2, 3)) == 0
    assert pool.match_prefix(make_rows(1, 2, extra=1))[1] == 0
    fresh = run(pool, rows)
    assert (
        pool.match_prefix(make_rows(1, 2, extra=1))[0].tolist() == pool.page_table(fresh).tolist()
    )
    pool.release(seq)
    pool.check()
    assert (pool.num_free, pool.num_used) == (6, 2)
