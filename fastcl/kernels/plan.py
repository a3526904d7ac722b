"""How a matrix is cut into tiles: a pure function of sizes and budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Chunk(NamedTuple):
    """Rows or columns [start, stop)."""

    start: int
    stop: int

    @property
    def slice(self) -> slice:
        """The chunk as an index."""
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        """How many rows or columns."""
        return self.stop - self.start


class TilePlan(NamedTuple):
    """Tiles of at most `rows` x `cols`; `keep`: one row of tiles stays while its rows are finished.

    With `keep`, a loss whose row weights are known up front makes every tile once (6NMD in all);
    without it, tiles are made again for the gradient (8NMD). `owned`: programs that own some lines
    make their gradient, from similarities made anew for each side, and no tile is stored.
    """

    n: int
    m: int
    rows: int
    cols: int
    keep: bool
    owned: bool = False

    def row_chunks(self) -> Iterator[Chunk]:
        """The rows, in order."""
        return _chunks(self.n, self.rows)

    def col_chunks(self) -> Iterator[Chunk]:
        """The columns, in order."""
        return _chunks(self.m, self.cols)

    @property
    def workspace(self) -> int:
        """Elements of tile storage."""
        if self.owned:
            return 0
        return min(self.rows, self.n) * (self.m if self.keep else min(self.cols, self.m))


def _chunks(total: int, size: int) -> Iterator[Chunk]:
    for start in range(0, total, size):
        yield Chunk(start, min(start + size, total))


_STEP_ELEMENTS = 1 << 19  # widened elements that a step of a loop over rows may hold


def row_slices(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows, of `width` elements each, whose widened copies stay small."""
    for chunk in _chunks(rows, max(1, _STEP_ELEMENTS // width)):
        yield chunk.slice


def plan_tiles(
    n: int,
    m: int,
    itemsize: int,
    workspace: int,
    *,
    keep: bool = False,
    tile: tuple[int, int] = (1024, 2048),
    fewest_rows: int = 256,
    line_bytes: int = 0,
) -> TilePlan:
    """Cuts an n x m matrix into tiles whose storage fits `workspace` bytes.

    Args:
        n, m: rows and columns.
        itemsize: bytes of one element of a tile, with its packed copies.
        workspace: budget in bytes. A tile never shrinks below 16 x 64, whatever the budget.
        keep: ask for rows of tiles that stay until their rows are finished. Granted where at least
            `fewest_rows` rows (or all n) fit; fewer would starve the matrix products.
        tile: preferred rows and columns, halved while they exceed the budget.
        line_bytes: bytes that each row and each column of a tile needs beside it (operands
            widened or packed, a row's gradient in float32).

    >>> plan_tiles(8192, 8192, 4, 32 << 20)
    TilePlan(n=8192, m=8192, rows=1024, cols=2048, keep=False, owned=False)
    >>> plan_tiles(8192, 8192, 4, 32 << 20, keep=True)
    TilePlan(n=8192, m=8192, rows=1024, cols=2048, keep=True, owned=False)
    >>> plan_tiles(8192, 1 << 20, 4, 32 << 20, keep=True).keep
    False
    """
    rows, cols = tile
    if keep:
        budget = workspace - min(cols, m) * line_bytes
        kept_rows = min(rows, budget // (m * itemsize + line_bytes))
        if kept_rows >= min(n, fewest_rows):
            return TilePlan(n, m, kept_rows, cols, True)
    while rows > 16 or cols > 64:
        r, c = min(rows, n), min(cols, m)
        if r * c * itemsize + (r + c) * line_bytes <= workspace:
            break
        if rows > 16 and (rows * 2 > cols or cols <= 64):
            rows //= 2
        else:
            cols //= 2
    return TilePlan(n, m, rows, cols, False)


def plan_symmetric(
    n: int, itemsize: int, workspace: int, *, tile: int = 1024, line_bytes: int = 0
) -> TilePlan:
    """Square tiles for a symmetric matrix, of which only the upper half is made.

    >>> plan_symmetric(10_000, 4, 32 << 20)
    TilePlan(n=10000, m=10000, rows=1024, cols=1024, keep=False, owned=False)
    """
    while tile > 16:
        side = min(tile, n)
        if side * side * itemsize + 2 * side * line_bytes <= workspace:
            break
        tile //= 2
    return TilePlan(n, n, tile, tile, False)
