"""How matrices are cut into tiles: everything once, in order, within the budget."""

from __future__ import annotations

import doctest
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastcl.kernels import plan
from fastcl.kernels.plan import Chunk, plan_symmetric, plan_tiles

FEWEST_ROWS = 256
TILES = [(1024, 2048), (512, 2048)]  # those the walks ask for
lengths = st.integers(1, 5000) | st.integers(1, 1 << 20)
itemsizes = st.sampled_from([4, 8, 12])
workspaces = st.integers(1 << 16, 1 << 29) | st.integers(1 << 16, 1 << 19)
line_bytes = st.sampled_from([0, 0, 8]) | st.integers(0, 1 << 15)


def _covers(chunks: list[Chunk], total: int, size: int) -> None:
    """Consecutive, without gap or overlap, from 0 to the end, each full but the last."""
    assert chunks[0].start == 0
    assert chunks[-1].stop == total
    assert all(a.stop == b.start for a, b in pairwise(chunks))
    assert all(c.size == size for c in chunks[:-1])
    assert 0 < chunks[-1].size <= size


def _bytes(rows: int, cols: int, itemsize: int, line: int) -> int:
    """What a tile takes, its operands included."""
    return rows * cols * itemsize + (rows + cols) * line


@given(st.integers(1, 5000), st.integers(1, 5000), itemsizes, workspaces, line_bytes, st.booleans())
def test_chunks_cover_everything_once_in_order(
    n: int, m: int, itemsize: int, workspace: int, line: int, keep: bool
) -> None:
    cut = plan_tiles(n, m, itemsize, workspace, keep=keep, line_bytes=line)
    _covers(list(cut.row_chunks()), n, cut.rows)
    _covers(list(cut.col_chunks()), m, cut.cols)
    assert [c.slice for c in cut.row_chunks()] == [slice(*c) for c in cut.row_chunks()]
    # Storage holds the largest tile, or the largest row of tiles that stays.
    tallest = max(c.size for c in cut.row_chunks())
    assert cut.workspace == tallest * (m if cut.keep else max(c.size for c in cut.col_chunks()))


@given(lengths, lengths, itemsizes, workspaces, line_bytes, st.sampled_from(TILES))
@example(5000, 5000, 4, 1 << 16, 0, TILES[0])
@example(5000, 5000, 12, 1 << 16, 1 << 15, TILES[1])
def test_the_budget_is_respected_down_to_the_smallest_tile(
    n: int, m: int, itemsize: int, workspace: int, line: int, tile: tuple[int, int]
) -> None:
    cut = plan_tiles(n, m, itemsize, workspace, tile=tile, line_bytes=line)
    assert not cut.keep
    used = _bytes(min(cut.rows, n), min(cut.cols, m), itemsize, line)
    assert used <= workspace or (cut.rows <= 16 and cut.cols <= 64)
    assert cut.rows <= tile[0]
    assert cut.cols <= tile[1]
    # Nothing is halved without need: a step back, to twice the rows or the columns, exceeds it.
    steps = {(cut.rows * 2, cut.cols), (cut.rows, cut.cols * 2)}
    steps = {(r, c) for r, c in steps if r <= tile[0] and c <= tile[1]}
    assert not steps or any(
        _bytes(min(r, n), min(c, m), itemsize, line) > workspace for r, c in steps
    )


@given(lengths, lengths, itemsizes, workspaces, line_bytes, st.sampled_from(TILES))
@example(5000, 5000, 4, 1 << 16, 1 << 15, TILES[0])
def test_a_tile_never_shrinks_below_16_rows_of_64(
    n: int, m: int, itemsize: int, workspace: int, line: int, tile: tuple[int, int]
) -> None:
    cut = plan_tiles(n, m, itemsize, workspace, tile=tile, line_bytes=line)
    assert cut.rows >= 16
    assert cut.cols >= 64


@given(st.integers(1, 5000), lengths, itemsizes, workspaces, line_bytes, st.sampled_from(TILES))
@example(5000, 4096, 4, FEWEST_ROWS * 4096 * 4, 0, TILES[1])
@example(5000, 4096, 4, FEWEST_ROWS * 4096 * 4 - 1, 0, TILES[1])
@example(100, 4096, 4, 100 * 4096 * 4, 0, TILES[1])
@example(100, 4096, 4, 100 * 4096 * 4 - 1, 0, TILES[1])
def test_rows_are_kept_where_enough_fit(
    n: int, m: int, itemsize: int, workspace: int, line: int, tile: tuple[int, int]
) -> None:
    cut = plan_tiles(n, m, itemsize, workspace, keep=True, tile=tile, line_bytes=line)
    fewest = min(n, FEWEST_ROWS)
    columns = min(tile[1], m) * line  # the operand of one tile's columns
    assert cut.keep == (fewest * (m * itemsize + line) + columns <= workspace)
    if cut.keep:
        assert fewest <= cut.rows <= tile[0]
        assert cut.rows * (m * itemsize + line) + columns <= workspace
        more = cut.rows + 1
        assert more > tile[0] or more * (m * itemsize + line) + columns > workspace
    else:
        assert cut == plan_tiles(n, m, itemsize, workspace, tile=tile, line_bytes=line)


@given(st.integers(1, 5000), itemsizes, workspaces, line_bytes)
def test_symmetric_tiles_are_square_and_within_the_budget(
    n: int, itemsize: int, workspace: int, line: int
) -> None:
    cut = plan_symmetric(n, itemsize, workspace, line_bytes=line)
    assert (cut.n, cut.m, cut.rows, cut.keep) == (n, n, cut.cols, False)
    # Tiles above the diagonal mirror those below it: rows and columns are cut alike.
    assert list(cut.row_chunks()) == list(cut.col_chunks())
    _covers(list(cut.row_chunks()), n, cut.rows)
    side = min(cut.rows, n)
    assert _bytes(side, side, itemsize, line) <= workspace or cut.rows == 16
    twice = min(2 * cut.rows, n)
    assert cut.rows == 1024 or _bytes(twice, twice, itemsize, line) > workspace
    assert 16 <= cut.rows <= 1024


@pytest.mark.parametrize("keep", [False, True])
def test_a_plan_does_not_depend_on_anything_else(keep: bool) -> None:
    cut = plan_tiles(8192, 8192, 4, 1 << 20, keep=keep)
    assert cut == plan_tiles(8192, 8192, 4, 1 << 20, keep=keep)
    assert not cut.keep


def test_doctests() -> None:
    failed, tried = doctest.testmod(plan)
    assert tried >= 4
    assert failed == 0
