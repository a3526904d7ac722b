"""The sigmoid kernel: loss and gradient of a chunk of negatives in one evaluation."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.triton.block import (
    block_of,
    exp_above,
    kept_similarity,
    logits,
    row_terms,
    similarity,
    store_gradient,
    store_pairs,
)


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1] (degree 9, relative error 5e-9), exact however small e is.

    log2(1 + e) by the hardware is 0 below e^-16.6, and a million such negatives are a loss.
    """
    p = e * -0.0032440253597032682 + 0.019851465106643054
    p = p * e - 0.05695954357702793
    p = p * e + 0.10603656331491669
    p = p * e - 0.15305593798462908
    p = p * e + 0.19675939855978122
    p = p * e - 0.24954133822095248
    p = p * e + 0.33329962441086086
    p = p * e - 0.4999990242439025
    p = p * e + 0.9999999952875281
    return p * e


@triton.jit(do_not_specialize=["n", "m", "diagonal"])
def sigmoid(
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
    row_weight,
    row_loss,
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
    PAIRS: tl.constexpr,
    KEPT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
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
    """Partial row sums of softplus(l); with GRADIENT, g_out <- scale_i weight_i sigmoid(l_ij)."""
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
    if PAIRS:
        store_pairs(
            s, of_rows, bias, col_bias, diagonal, rows, cols, n, m, pair_s, pair_logits, COL_BIAS
        )
    e = exp_above(-tl.abs(x), 0.0, FAST)  # in (0, 1]; 0 for dropped pairs
    if LOSS:
        total = tl.sum(tl.maximum(x, 0.0) + log1p_of_unit(e), axis=1)
        tl.store(row_loss + j * n + rows, total, mask=rows < n)
    if GRADIENT:
        g = tl.where(x > 0, 1.0, e) / (1.0 + e)
        if WEIGHTS:
            g *= tl.load(row_weight + rows, mask=rows < n, other=0.0)[:, None]
        if ROW_GS:
            tl.store(row_gs + j * n + rows, tl.sum(g * s, axis=1), mask=rows < n)
        if ROW_G:
            tl.store(row_g + j * n + rows, tl.sum(g, axis=1), mask=rows < n)
        if COL_G:
            tl.store(col_g + i * m + cols, tl.sum(g, axis=0), mask=cols < m)
        g *= of_rows[:, None]
        if UNIT:
            g *= tl.load(unit)
        store_gradient(g, g_out, rows, cols, n, m, SPLIT)
