"""Chunks and blocks for a GPU: pure functions, within their budget."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcl.kernels.triton import plan
from fastcl.kernels.triton.plan import (
    CHUNK,
    FEWEST_KEPT_ROWS,
    blocks_for,
    parts_of_gradient,
    plan_chunks,
    plan_symmetric_chunks,
)

lengths = st.integers(1, 1 << 21)
dims = st.sampled_from([1, 7, 64, 100, 512, 768, 1152, 4096])
itemsizes = st.sampled_from([2, 4])
budgets = st.integers(32 << 20, 4 << 30)


@given(lengths, lengths, dims, itemsizes, budgets, st.booleans())
def test_chunks_cover_the_matrix_within_the_budget(
    n: int, m: int, dim: int, itemsize: int, budget: int, keep: bool
) -> None:
    cut = plan_chunks(n, m, dim, itemsize, budget, keep=keep)
    assert sum(c.size for c in cut.row_chunks()) == n
    assert sum(c.size for c in cut.col_chunks()) == m
    rows, cols = min(cut.rows, n), min(cut.cols, m)
    kept = rows * m * 4 if cut.keep else 0
    gradient = rows * cols * itemsize * parts_of_gradient(cut, itemsize)
    online = rows * cols * 4 if keep and not cut.keep else 0  # the similarities of one chunk
    assert kept + online + gradient + rows * 4 * dim <= budget or (
        cut.rows <= 16 and cut.cols <= 64
    )
    if cut.keep:
        assert rows >= min(n, FEWEST_KEPT_ROWS)
    assert rows * cols < 1 << 31  # offsets within partial sums are 32-bit


@given(lengths, itemsizes, budgets)
def test_symmetric_chunks_are_square(n: int, itemsize: int, budget: int) -> None:
    cut = plan_symmetric_chunks(n, itemsize, budget)
    assert cut.rows == cut.cols
    assert cut.rows <= plan.SYMMETRIC_CHUNKS[1]
    assert min(cut.rows, n) ** 2 * itemsize * parts_of_gradient(cut, itemsize) <= budget


def test_the_default_budget_takes_the_whole_chunk() -> None:
    cut = plan_chunks(65536, 65536, 768, 2, 256 << 20)
    assert (cut.rows, cut.cols) == CHUNK


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [1, 7, 16, 64, 100, 768, 4096])
def test_blocks_are_what_the_matrix_units_take(dim: int, itemsize: int, arch: int) -> None:
    block = blocks_for(itemsize, dim, arch)
    assert block.k >= 16
    assert dim <= 16 or -(-dim // block.k) >= 2  # copies are in flight while a step is multiplied
    assert {block.m, block.n} <= {64, 128}
    assert block.down(1) == block.across(1) == 1
    assert block.down(129) * block.m >= 129


@given(lengths, lengths, st.integers(1, plan.OWNED_DIM[2]), budgets)
def test_owned_chunks_cover_the_matrix_within_the_budget(
    n: int, m: int, dim: int, budget: int
) -> None:
    cut = plan.plan_owned(n, m, dim, budget)
    assert cut.owned
    assert sum(c.size for c in cut.row_chunks()) == n
    rows, cols = min(cut.rows, n), min(cut.cols, m)
    if cut.rows > 128:
        partial_statistics = 8 * (rows * -(-cols // 128) + cols * -(-rows // 128))
        blocks = plan.owner_blocks(dim)
        added_up = 0
        for own, other in ((rows, cols), (cols, rows)):
            parts = plan.owner_parts(own, other, blocks, plan.PROCESSORS, budget // 2)
            added_up = max(added_up, (parts + 1) * own * dim * 4 if parts > 1 else 0)
        of_rows = 4 * dim * rows
        # Lines past the last whole block have partial statistics of their own.
        assert of_rows + partial_statistics + added_up <= budget + 16 * (rows + cols)


@given(
    lengths,
    lengths,
    st.sampled_from([80, 90, 100, 120]),
    st.integers(1, 304),
    st.integers(1 << 20, 1 << 30),
)
def test_parts_share_all_blocks(n: int, m: int, arch: int, processors: int, room: int) -> None:
    blocks = plan.owner_blocks(64, arch)
    parts = plan.owner_parts(n, m, blocks, processors, room)
    of_part = -(-blocks.across(m) // parts)
    assert parts >= 1
    assert of_part * parts >= blocks.across(m)
    assert parts == 1 or parts * blocks.down(n) <= 2 * processors
    assert parts == 1 or of_part >= 4  # a walk is worth its start


def test_small_problems_split_g() -> None:
    small, large = (plan_chunks(n, n, 512, 2, 256 << 20) for n in (2048, 2049))
    assert (parts_of_gradient(small, 2), parts_of_gradient(large, 2)) == (2, 1)
    assert parts_of_gradient(small, 4) == 1


def test_doctests() -> None:
    failed, tried = doctest.testmod(plan)
    assert tried >= 5
    assert failed == 0
