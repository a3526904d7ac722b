"""What one block of a matrix costs a loss: tiles, products, launches, bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Stream
from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.kernels.plan import Chunk, TilePlan
from fastcl.kernels.triton.plan import ALIGNMENT, PROCESSORS, blocks_for, by_library, owned_bytes


class Kind(NamedTuple):
    """A loss, and whether its gradient is made in the forward."""

    loss: str
    one_pass: bool

    @property
    def softmax(self) -> bool:
        """Whether statistics come before the gradient."""
        return self.loss != "siglip_loss"


class BlockCost(NamedTuple):
    """One block, forward and backward; products in entries of the matrix, the rest as it is."""

    plan: TilePlan
    tiles: int
    passes: tuple[str, ...]
    products: int
    launches: int
    traffic: int
    workspace: int
    accumulators: int


def block_cost(
    kind: Kind,
    n: int,
    m: int,
    dim: int,
    dtype: torch.dtype,
    backend: str,
    budget: int,
    *,
    symmetric: bool,
) -> BlockCost:
    """Of n rows against m columns; `symmetric`: against themselves."""
    found = dispatch.get(backend)
    u, v = (torch.empty(rows, dim, dtype=dtype, device="meta") for rows in (n, m))
    scale = torch.empty(1, device="meta")
    stream = Stream(u, None if symmetric else v, scale, None, None, None, None, 0, budget)
    plan = found.plan(stream, keep=kind.softmax and kind.one_pass)
    rows, cols = list(plan.row_chunks()), list(plan.col_chunks())
    pairs = [(r, c) for r in rows for c in cols if not symmetric or c.start >= r.start]
    # Of the symmetric matrix, tiles on the diagonal have no mirror image.
    diagonal = [(r, c) for r, c in pairs if symmetric and r.start == c.start]
    parts = found.products(stream).parts(plan)
    passes, made, kernels = _passes(kind, plan)
    of_side = (parts + 1, 1) if plan.owned else (parts, parts)  # products, and launches
    area, mirrorless = (sum(r.size * c.size for r, c in some) for some in (pairs, diagonal))
    launches = len(pairs) * (kernels + 2 * of_side[1]) - len(diagonal) * of_side[1]
    fused = backend == "triton" and dtype != torch.float64
    if fused and kind.softmax:  # partial statistics are merged in launches of their own
        launches += len(pairs) * (1 if kind.loss == "info_nce" else 2) - len(diagonal)
    if fused and not plan.owned:  # similarities that the library makes are launches, too
        padded = dim + -dim % ALIGNMENT
        blocks = blocks_for(dtype.itemsize, padded, split=parts == 2)
        few = [by_library(r.size, c.size, padded, blocks, PROCESSORS) for r, c in pairs]
        launches += made * sum(few)
    wide = accumulation_dtype(dtype)
    if kind.one_pass:  # gradients made in the forward wait for the backward
        accumulators = (n + m) * dim
    else:
        accumulators = (m + min(plan.rows, n)) * dim if dtype != wide else 0
    tile = 0 if plan.owned else parts * min(plan.rows, n) * min(plan.cols, m)
    if plan.owned:
        stored = owned_bytes(min(plan.rows, n), min(plan.cols, m), dim)
    else:
        stored = plan.workspace * wide.itemsize if plan.keep or not fused else 0
    return BlockCost(
        plan,
        len(pairs),
        passes,
        made * area + of_side[0] * (2 * area - mirrorless),
        launches,
        _traffic(
            plan, pairs, symmetric, dim, dtype, passes=(made, kernels), parts=parts, fused=fused
        ),
        stored + (tile * dtype.itemsize if fused else 0),
        accumulators,
    )


def _passes(kind: Kind, plan: TilePlan) -> tuple[tuple[str, ...], int, int]:
    """(what is done with each tile, how often it is made for that, kernels beside the products)."""
    first = ("statistics",) if kind.softmax else () if kind.one_pass else ("loss",)
    count = len(first)
    if plan.owned:  # the products, and the similarities for them, are the owners' kernels
        what = "gradient" if first else "loss and gradient"
        return (*first, f"{what} by the rows' owners, then the columns'"), count, count
    if not first:
        return ("loss and gradient", "two gradient products"), 1, 1
    made = "kept similarities" if plan.keep else "similarities made again"
    passes = (*first, f"gradient from {made}", "two gradient products")
    return passes, 1 if plan.keep else 2, 2


def _traffic(
    plan: TilePlan,
    pairs: list[tuple[Chunk, Chunk]],
    symmetric: bool,
    dim: int,
    dtype: torch.dtype,
    *,
    passes: tuple[int, int],
    parts: int,
    fused: bool,
) -> int:
    """Bytes of tiles, operands and accumulators; `passes`: (products of S, kernels over a tile)."""
    wide, item = accumulation_dtype(dtype).itemsize, dtype.itemsize
    made, kernels = passes
    products = 1 if plan.owned else parts  # that add to an accumulator, for each side of a tile
    tiles = operands = added = 0
    for r, c in pairs:
        size, lines = r.size * c.size, r.size + c.size
        sides = 1 if symmetric and r.start == c.start else 2
        if plan.owned:
            operands += (made + sides) * lines
        else:
            operands += made * lines + parts * (lines if sides == 2 else c.size)
        if fused and not plan.owned:  # G written, and read for each side; kept similarities
            tiles += parts * item * (1 + sides) * size + (2 * wide * size if plan.keep else 0)
        elif not fused:  # S written and read, G written and read
            tiles += wide * (made + kernels + 1 + sides) * size
        added += products * (lines if sides == 2 else r.size)
    first = plan.n if symmetric else plan.n + plan.m  # written, not read
    return tiles + item * dim * operands + wide * dim * (2 * added - first)
