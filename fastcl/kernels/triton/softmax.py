"""The softmax kernels: statistics of a chunk, its gradient, and the merging of partial statistics.

Each program reduces its block to one number per row and per column, in arrays of partials with one
line for each block, which :func:`merge` adds to the running statistics in the order of the blocks.
So there are no atomics, and the bits are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.triton.block import (
    block_of,
    exp_above,
    finite_or_zero,
    kept_similarity,
    logits,
    row_terms,
    similarity,
    store_gradient,
    store_pairs,
)


@triton.jit(do_not_specialize=["n", "m", "diagonal"])
def statistics(
    u,
    v,
    scale,
    row_bias,
    col_bias,
    row_ids,
    col_ids,
    pair_s,
    pair_logits,
    kept_s,
    row_max,
    row_sum,
    col_max,
    col_sum,
    n,
    m,
    diagonal,
    stride_u,
    stride_v,
    D: tl.constexpr,
    SCALES: tl.constexpr,
    ROW_BIAS: tl.constexpr,
    COL_BIAS: tl.constexpr,
    IDS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PAIRS: tl.constexpr,
    KEPT: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAST: tl.constexpr,
):
    """Partial (maximum, sum of e^(l - maximum)) of each row and column of each block.

    KEPT: s is read, not made; KEEP: it is left for a later kernel to read.
    """
    i, j = block_of(tl.program_id(0), n, m, BLOCK_M, BLOCK_N, GROUP)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
    if KEPT:
        s = kept_similarity(kept_s, rows, cols, n, m)
    else:
        s = similarity(
            u, v, rows, cols, n, m, stride_u, stride_v, D,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    of_rows, bias = row_terms(scale, row_bias, rows, n, SCALES, ROW_BIAS)
    x = logits(
        s, of_rows, bias, col_bias, row_ids, col_ids, diagonal, rows, cols, n, m,
        COL_BIAS, IDS, DIAGONAL,
    )  # fmt: skip
    if KEEP:
        at = kept_s + rows.to(tl.int64)[:, None] * m + cols[None, :]
        tl.store(at, s, mask=(rows < n)[:, None] & (cols < m)[None, :])
    if PAIRS:
        store_pairs(
            s, of_rows, bias, col_bias, diagonal, rows, cols, n, m, pair_s, pair_logits, COL_BIAS
        )
    if ROWS:
        top = tl.max(x, axis=1)
        total = tl.sum(exp_above(x, finite_or_zero(top)[:, None], FAST), axis=1)
        tl.store(row_max + j * n + rows, top, mask=rows < n)
        tl.store(row_sum + j * n + rows, total, mask=rows < n)
    if COLS:
        top = tl.max(x, axis=0)
        total = tl.sum(exp_above(x, finite_or_zero(top)[None, :], FAST), axis=0)
        tl.store(col_max + i * m + cols, top, mask=cols < m)
        tl.store(col_sum + i * m + cols, total, mask=cols < m)


@triton.jit(do_not_specialize=["lines", "blocks"])
def merge(part_max, part_sum, line_max, line_sum, lines, blocks, BLOCK: tl.constexpr):
    """Adds the blocks' partial statistics to the running ones of each line, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < lines
    top = tl.load(line_max + at, mask=inside, other=-float("inf"))
    total = tl.load(line_sum + at, mask=inside, other=0.0)
    for b in range(blocks):
        here = tl.load(part_max + b * lines + at, mask=inside, other=-float("inf"))
        here_sum = tl.load(part_sum + b * lines + at, mask=inside, other=0.0)
        new = tl.maximum(top, here)
        ref = finite_or_zero(new)
        total = total * tl.exp(top - ref) + here_sum * tl.exp(here - ref)
        top = new
    tl.store(line_max + at, top, mask=inside)
    tl.store(line_sum + at, total, mask=inside)


@triton.jit(do_not_specialize=["n", "m", "diagonal"])
def gradient(
    u,
    v,
    scale,
    row_bias,
    col_bias,
    row_ids,
    col_ids,
    kept_s,
    row_max,
    row_weight,
    col_max,
    col_weight,
    g_out,
    unit,
    row_gs,
    row_g,
    col_g,
    n,
    m,
    diagonal,
    stride_u,
    stride_v,
    D: tl.constexpr,
    SCALES: tl.constexpr,
    ROW_BIAS: tl.constexpr,
    COL_BIAS: tl.constexpr,
    IDS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    KEPT: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROW_GS: tl.constexpr,
    ROW_G: tl.constexpr,
    COL_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    FAST: tl.constexpr,
):
    """g_out <- scale_i G_ij (without SCALED: G_ij), where G = sum over sides of weight e^(l - max).

    It is 0 at the dropped pairs. With partial sums per block: sum_j G s, sum_j G, sum_i G. KEPT: s
    is read, not made again.
    """
    i, j = block_of(tl.program_id(0), n, m, BLOCK_M, BLOCK_N, GROUP)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
    if KEPT:
        s = kept_similarity(kept_s, rows, cols, n, m)
    else:
        s = similarity(
            u, v, rows, cols, n, m, stride_u, stride_v, D,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    of_rows, bias = row_terms(scale, row_bias, rows, n, SCALES, ROW_BIAS)
    x = logits(
        s, of_rows, bias, col_bias, row_ids, col_ids, diagonal, rows, cols, n, m,
        COL_BIAS, IDS, DIAGONAL,
    )  # fmt: skip
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ROWS:
        top = finite_or_zero(tl.load(row_max + rows, mask=rows < n, other=0.0))
        weight = tl.load(row_weight + rows, mask=rows < n, other=0.0)
        g += exp_above(x, top[:, None], FAST, BELOW=True) * weight[:, None]
    if COLS:
        top = finite_or_zero(tl.load(col_max + cols, mask=cols < m, other=0.0))
        weight = tl.load(col_weight + cols, mask=cols < m, other=0.0)
        g += exp_above(x, top[None, :], FAST, BELOW=True) * weight[None, :]
    if ROW_GS:
        tl.store(row_gs + j * n + rows, tl.sum(g * s, axis=1), mask=rows < n)
    if ROW_G:
        tl.store(row_g + j * n + rows, tl.sum(g, axis=1), mask=rows < n)
    if COL_G:
        tl.store(col_g + i * m + cols, tl.sum(g, axis=0), mask=cols < m)
    if SCALED:
        g *= of_rows[:, None]
    if UNIT:
        g *= tl.load(unit)
    store_gradient(g, g_out, rows, cols, n, m, SPLIT)
