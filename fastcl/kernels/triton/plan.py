"""How a matrix is cut for a GPU: chunks for the matrix products, blocks for the kernels.

Pure functions of shapes, dtype, architecture and budget. A chunk is one launch of a kernel, and two
matrix products for the gradients; a block is one program of the launch.
"""

from __future__ import annotations

from typing import NamedTuple

from fastcl.kernels.plan import TilePlan, plan_symmetric, plan_tiles

ALIGNMENT = 16
"""Elements to which rows are padded for the kernels: unaligned, they would be copied one by one."""
CHUNK = (5632, 16384)
"""Rows and columns of a chunk, where the budget allows: 185 MB of G in 16 bits, and few passes over
the float32 accumulators, which are what a chunk reads and writes beside G."""
KEPT_CHUNK = (4096, 16384)
FEWEST_KEPT_ROWS = 2048  # fewer would read and write the accumulator of v for too little work
SYMMETRIC_CHUNKS = (2048, 8192)  # the smallest and the largest side
SPLIT_UP_TO = 1 << 22  # pairs
PROCESSORS = 132
"""Multiprocessors of an H200 (an H100 SXM has as many)."""
LONG = 2048
"""Dimension from which on a product of few blocks is worth splitting."""
OWNED_DIM = {2: 128}
"""Up to this dimension, by bytes of a number, gradients are made by their owners. Not of float32:
its exact products are made of many instructions, which owners would issue once more."""
OWNED_CHUNK = 16384


class Blocks(NamedTuple):
    """The block of one program, and how Triton compiles it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8

    def down(self, rows: int) -> int:
        """Blocks along the rows."""
        return -(-rows // self.m)

    def across(self, cols: int) -> int:
        """Blocks along the columns."""
        return -(-cols // self.n)


def blocks_for(itemsize: int, dim: int, arch: int = 90, *, split: bool = False) -> Blocks:
    """The block for embeddings of `itemsize` bytes and dimension `dim`, on sm_`arch`.

    128 x 128 float32 accumulators take 64 registers of each thread; 128 x 256 would leave none for
    the exponentials, and from sm_100 on, with float32 operands, or where G is `split` in two, so
    would 128 x 128. (G is split of few pairs, which want more blocks anyway.) There are at least
    two steps of the products, so that the copies of one are in flight while the other is
    multiplied.

    >>> blocks_for(2, 768)
    Blocks(m=128, n=128, k=64, warps=8, stages=3, group=8)
    >>> blocks_for(2, 64).k
    32
    """
    k = 64 if itemsize == 2 else 32
    while k > 16 and k >= dim:
        k //= 2
    steps = -(-dim // k)
    narrow = arch >= 100 or itemsize > 2 or split
    return Blocks(128, 64 if narrow else 128, k, 8, max(1, min(3, steps)))


KEPT = Blocks(32, 64, 16, 4, 1)
"""The block where similarities are read, not made: nothing is multiplied, so it may be small."""


def by_library(rows: int, cols: int, dim: int, blocks: Blocks, processors: int) -> bool:
    """Whether a chunk's similarities are left to the matrix library, which the kernels then read.

    A few blocks with long rows would leave most of a device idle, for long; the library splits
    such products along D as well.

    >>> by_library(512, 512, 4096, blocks_for(2, 4096), 132)
    True
    >>> by_library(512, 512, 768, blocks_for(2, 768), 132)
    False
    """
    few = 2 * blocks.down(rows) * blocks.across(cols) <= processors
    return few and dim >= LONG


def small_blocks(dim: int) -> Blocks:
    """Blocks for the interpreter, where a program costs more than its arithmetic."""
    return Blocks(32, 64, 16 if dim <= 16 else 64, 4, 1)


class OwnerBlocks(NamedTuple):
    """The block of a program that owns `m` lines, and meets `n` others at a time."""

    m: int
    n: int
    d: int
    warps: int
    stages: int

    def down(self, lines: int) -> int:
        """Blocks of owned lines."""
        return -(-lines // self.m)

    def across(self, others: int) -> int:
        """Blocks of the others."""
        return -(-others // self.n)


def owned(dim: int, itemsize: int) -> bool:
    """Whether gradients are made by their owners: where a whole row of one fits in registers.

    >>> owned(128, 2), owned(768, 2), owned(128, 4)
    (True, False, False)
    """
    return dim <= OWNED_DIM.get(itemsize, 0)


def owner_blocks(dim: int, arch: int = 90) -> OwnerBlocks:
    """The block of owners of (padded) dimension `dim`, on sm_`arch`.

    Where the matrix units read the owned rows from registers (all but sm_90 and sm_100), half as
    many rows leave room for their gradient.

    >>> owner_blocks(128)
    OwnerBlocks(m=128, n=64, d=128, warps=8, stages=2)
    """
    return OwnerBlocks(128 if 90 <= arch < 120 else 64, 64, _power_of_2(dim), 8, 2)


def small_owner_blocks(dim: int) -> OwnerBlocks:
    """Blocks for the interpreter."""
    return OwnerBlocks(32, 64, _power_of_2(dim), 4, 1)


def _power_of_2(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def owner_parts(n: int, m: int, blocks: OwnerBlocks, processors: int, room: int) -> int:
    """In how many parts the walk over the others is cut, so that few owners fill a device.

    The parts' gradients and their sum must fit `room`, in bytes.

    >>> blocks = owner_blocks(128)
    >>> [owner_parts(n, n, blocks, 132, 128 << 20) for n in (1024, 4096, 16384)]
    [4, 8, 2]
    """
    fitting = room // (4 * blocks.d * n) - 1
    return max(1, min(2 * processors // blocks.down(n), blocks.across(m) // 4, fitting))


def plan_owned(n: int, m: int, dim: int, workspace: int) -> TilePlan:
    """Cuts an n x m matrix whose gradients owners make: G takes no room, partial sums little.

    >>> plan_owned(65536, 65536, 128, 256 << 20)
    TilePlan(n=65536, m=65536, rows=16384, cols=16384, keep=False, owned=True)
    """
    rows = cols = OWNED_CHUNK
    while rows > 128 and owned_bytes(min(rows, n), min(cols, m), dim) > workspace // 2:
        rows, cols = rows // 2, cols // 2
    return TilePlan(n, m, rows, cols, keep=False, owned=True)


def owned_bytes(rows: int, cols: int, dim: int) -> int:
    """Partial statistics of both sides, 8 bytes for each line of a block, and a rows' gradient.

    The other half of a workspace is room for partial gradients (see owner_parts).
    """
    return 2 * 8 * rows * cols // 128 + 4 * dim * rows


def plan_chunks(
    n: int, m: int, dim: int, itemsize: int, workspace: int, *, keep: bool = False
) -> TilePlan:
    """Cuts an n x m matrix into chunks whose storage fits `workspace` bytes.

    Args:
        n, m, dim: rows, columns, and the dimension of the embeddings.
        itemsize: bytes of an embedding's element, and so of G's.
        workspace: budget in bytes, for G, a chunk of rows' float32 gradient, and kept similarities.
        keep: ask for rows of similarities that stay, in float32, until their gradient is made:
            three products in place of four. Granted where at least 2048 rows (or all) fit.

    >>> plan_chunks(65536, 65536, 768, 2, 256 << 20)
    TilePlan(n=65536, m=65536, rows=5632, cols=16384, keep=False, owned=False)
    """
    line, itemsize = 4 * dim, itemsize * _parts(n, m, itemsize)
    if keep:
        itemsize += 4  # refused, too: online rescaling keeps the similarities of one chunk
        plan = plan_tiles(
            n, m, itemsize, workspace, keep=True, tile=KEPT_CHUNK,
            fewest_rows=FEWEST_KEPT_ROWS, line_bytes=line,
        )  # fmt: skip
        if plan.keep:
            return plan
    return plan_tiles(n, m, itemsize, workspace, tile=CHUNK, line_bytes=line)


def plan_symmetric_chunks(n: int, itemsize: int, workspace: int) -> TilePlan:
    """Square chunks for a symmetric matrix, of which only the upper half is made.

    Of chunks on the diagonal both halves are: four or more a side where they are large enough.

    >>> [plan_symmetric_chunks(n, 2, 256 << 20).rows for n in (4096, 16384, 65536)]
    [2048, 4096, 8192]
    """
    quarter = -(-n // (4 * 128)) * 128
    side = min(SYMMETRIC_CHUNKS[1], max(SYMMETRIC_CHUNKS[0], quarter))
    return plan_symmetric(n, itemsize * _parts(n, n, itemsize), workspace, tile=side)


def parts_of_gradient(plan: TilePlan, itemsize: int) -> int:
    """In how many matrices G enters its products: 2 (what was rounded, and the rest) or 1.

    One 16-bit G errs by 2^-9 of each entry. Over thousands of pairs that averages out below the
    rounding of the result; over a few it shows, and there the products cost nothing.

    >>> parts_of_gradient(plan_chunks(1024, 1024, 512, 2, 256 << 20), 2)
    2
    >>> parts_of_gradient(plan_chunks(65536, 65536, 512, 2, 256 << 20), 2)
    1
    """
    return _parts(plan.n, plan.m, itemsize)


def _parts(n: int, m: int, itemsize: int) -> int:
    return 2 if itemsize == 2 and n * m <= SPLIT_UP_TO else 1
