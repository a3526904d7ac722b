"""What every kernel does first: a block of raw similarities in registers, and its logits.

A program owns BLOCK_M rows and BLOCK_N columns of one chunk. Its similarities are accumulated in
float32 and never leave the registers, unless a later pass asks to find them (KEEP).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of(pid, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(block row, block column) of a program: GROUP block rows share the columns they read."""
    across = tl.cdiv(m, BLOCK_N)
    group = pid // (GROUP * across)
    height = tl.minimum(tl.cdiv(n, BLOCK_M) - group * GROUP, GROUP)
    within = pid % (GROUP * across)
    return group * GROUP + within % height, within // height


@triton.jit
def similarity(
    u,
    v,
    rows,
    cols,
    n,
    m,
    stride_u,
    stride_v,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """s = u v^T of one block; 0 past the end, where the last row is read again."""
    k = tl.arange(0, BLOCK_K)
    u_at = u + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_u + k[None, :]
    v_at = v + tl.minimum(cols, m - 1).to(tl.int64)[:, None] * stride_v + k[None, :]
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            a = tl.load(u_at + start)
            b = tl.load(v_at + start)
        else:
            a = tl.load(u_at + start, mask=k[None, :] < D - start, other=0.0)
            b = tl.load(v_at + start, mask=k[None, :] < D - start, other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
    return zero_outside(s, rows, cols, n, m)


@triton.jit
def zero_outside(s, rows, cols, n, m):
    """s, and 0 past the last row or column: an infinity there would be a NaN of others' sums."""
    if (tl.max(rows, axis=0) >= n) | (tl.max(cols, axis=0) >= m):  # few blocks pay
        s = tl.where((rows < n)[:, None] & (cols < m)[None, :], s, 0.0)
    return s


@triton.jit
def kept_similarity(kept_s, rows, cols, n, m):
    """s of one block, as an earlier kernel or the library left it."""
    at = kept_s + rows.to(tl.int64)[:, None] * m + cols[None, :]
    return tl.load(at, mask=(rows < n)[:, None] & (cols < m)[None, :], other=0.0)


@triton.jit
def row_terms(scale, row_bias, rows, n, SCALES: tl.constexpr, ROW_BIAS: tl.constexpr):
    """(scale, bias) of each row: l = scale s + bias. The bias of rows past the end is -inf.

    SCALES, ROW_BIAS: 1 where one number serves all rows, 2 where each has its own, 0: none.
    """
    inside = rows < n
    if SCALES == 2:
        of_rows = tl.load(scale + rows, mask=inside, other=1.0)
    else:
        of_rows = tl.zeros(rows.shape, tl.float32) + tl.load(scale)
    bias = tl.zeros(rows.shape, tl.float32)
    if ROW_BIAS == 1:
        bias += tl.load(row_bias)
    if ROW_BIAS == 2:
        bias += tl.load(row_bias + rows, mask=inside, other=0.0)
    return of_rows, tl.where(inside, bias, -float("inf"))


@triton.jit
def logits(
    s,
    row_scale,
    row_bias,
    col_bias,
    row_ids,
    col_ids,
    diagonal,
    rows,
    cols,
    n,
    m,
    COL_BIAS: tl.constexpr,
    IDS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """l = scale s + biases; -inf for pairs that are dropped, and past the last row or column."""
    of_cols = tl.zeros(cols.shape, tl.float32)
    if COL_BIAS:
        of_cols = tl.load(col_bias + cols, mask=cols < m, other=0.0)
    of_cols = tl.where(cols < m, of_cols, -float("inf"))
    x = (s * row_scale[:, None] + row_bias[:, None]) + of_cols[None, :]
    if DIAGONAL:  # noqa: SIM102 (the outer one is decided when compiling)
        if meets_diagonal(rows, cols, diagonal):
            x = tl.where(cols[None, :] == rows[:, None] + diagonal, -float("inf"), x)
    if IDS:
        a = tl.load(row_ids + rows, mask=rows < n, other=0)
        b = tl.load(col_ids + cols, mask=cols < m, other=0)
        x = tl.where(a[:, None] == b[None, :], -float("inf"), x)
    return x


@triton.jit
def meets_diagonal(rows, cols, diagonal):
    """Whether a pair (i, i + diagonal) lies in the block: a scalar, so that few blocks pay."""
    first, last = tl.min(rows, axis=0) + diagonal, tl.max(rows, axis=0) + diagonal
    return (first <= tl.max(cols, axis=0)) & (last >= tl.min(cols, axis=0))


@triton.jit
def store_pairs(
    s,
    row_scale,
    row_bias,
    col_bias,
    diagonal,
    rows,
    cols,
    n,
    m,
    pair_s,
    pair_logits,
    COL_BIAS: tl.constexpr,
):
    """Writes s and l of the pairs (i, i + diagonal) that lie in this block, one per row."""
    if meets_diagonal(rows, cols, diagonal):
        partner = rows + diagonal
        here = (partner >= tl.min(cols, axis=0)) & (partner <= tl.max(cols, axis=0))
        here = here & (rows < n) & (partner < m)
        own = tl.sum(tl.where(cols[None, :] == partner[:, None], s, 0.0), axis=1)
        x = own * row_scale + row_bias
        if COL_BIAS:
            x += tl.load(col_bias + partner, mask=here, other=0.0)
        tl.store(pair_s + rows, own, mask=here)
        tl.store(pair_logits + rows, x, mask=here)


@triton.jit
def exp_above(x, ref, FAST: tl.constexpr, BELOW: tl.constexpr = False):
    """e^(x - ref), by the hardware's 2^x.

    BELOW: ref is a maximum of x as it was made before, of which a last bit may differ now.
    FAST, for 16-bit inputs: one fused multiply-add, which rounds ref log2(e), all pairs of a line
    alike, by what is 7e-6 at a logit of 100.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    power = x * LOG2E - ref * LOG2E if FAST else (x - ref) * LOG2E
    if BELOW:
        power = tl.minimum(power, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(power)


@triton.jit
def store_gradient(g, g_out, rows, cols, n, m, SPLIT: tl.constexpr):
    """Stores G in its products' dtype; SPLIT: and in a second matrix what that rounded away."""
    at = g_out + rows.to(tl.int64)[:, None] * m + cols[None, :]
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    rounded = g.to(g_out.dtype.element_ty)
    tl.store(at, rounded, mask=inside)
    if SPLIT:
        rest = (g - rounded.to(tl.float32)).to(g_out.dtype.element_ty)
        tl.store(at + n.to(tl.int64) * m, rest, mask=inside)


@triton.jit
def finite_or_zero(x):
    """-inf as the reference point of an empty line would make NaN of (-inf) - (-inf)."""
    return tl.where(x == -float("inf"), 0.0, x)
