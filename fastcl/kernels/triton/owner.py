"""The gradient of small embeddings: each line's owner walks over all lines of the other side.

A program holds BLOCK_M lines of one side and their whole gradient in registers, remakes the
similarities block by block, turns them into G, and multiplies on at once, as the backward of
FlashAttention does. G is never stored, nothing is added up in memory; in exchange similarities and
exponentials are made once for each side. TRANSPOSED: the owned lines are the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.triton.block import (
    exp_above,
    finite_or_zero,
    meets_diagonal,
    store_pairs,
    zero_outside,
)
from fastcl.kernels.triton.sigmoid import log1p_of_unit


@triton.jit
def lines_of(x, lines, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Embeddings [lines, BLOCK_D], zero beyond D and past the end (where G is zero, too)."""
    k = tl.arange(0, BLOCK_D)
    at = x + lines.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(at, mask=(lines < count)[:, None] & (k < D)[None, :], other=0.0)


@triton.jit
def term(x, lines, inside, KIND: tl.constexpr, ABSENT: tl.constexpr):
    """A vector's entries for some lines. KIND: 0 none, 1 one number for all, 2 one for each."""
    value = tl.zeros(lines.shape, tl.float32) + ABSENT
    if KIND == 1:
        value = tl.zeros(lines.shape, tl.float32) + tl.load(x)
    if KIND == 2:
        value = tl.load(x + lines, mask=inside, other=ABSENT)
    return value


@triton.jit
def product(g, x, total, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + g x, G rounded to the dtype of x; SPLIT: and what that rounded away, too."""
    rounded = g.to(x.dtype)
    if SPLIT:
        rest = (g - rounded.to(tl.float32)).to(x.dtype)
        if UPCAST:
            total = tl.dot(rest.to(tl.float32), x.to(tl.float32), total)
        else:
            total = tl.dot(rest, x, total, input_precision=PRECISION)
    if UPCAST:
        return tl.dot(rounded.to(tl.float32), x.to(tl.float32), total)
    return tl.dot(rounded, x, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n", "m", "diagonal", "blocks_of_part"])
def owned_gradient(
    own,
    other,
    scale,
    own_bias,
    other_bias,
    own_ids,
    other_ids,
    own_max,
    own_weight,
    other_max,
    other_weight,
    unit,
    pair_s,
    pair_logits,
    own_loss,
    own_gs,
    own_g,
    d_own,
    n,
    m,
    diagonal,
    blocks_of_part,
    stride_own,
    stride_other,
    D: tl.constexpr,
    D_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIGMOID: tl.constexpr,
    SCALES: tl.constexpr,
    OWN_BIAS: tl.constexpr,
    OTHER_BIAS: tl.constexpr,
    IDS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
    LOSS: tl.constexpr,
    SUM_GS: tl.constexpr,
    SUM_G: tl.constexpr,
    PRODUCT: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAST: tl.constexpr,
):
    """One part of d_own = G other, where G is scale_i times that of a softmax or of a sigmoid.

    Of n owned lines and m others; a part is some blocks of the others, and has its own outputs.
    Softmax: G = own_weight e^(l - own_max) (OWN) + other_weight e^(l - other_max) (OTHER).
    Sigmoid: G = weight sigmoid(l), the weight that of the row (OWN or OTHER), else 1. Also the
    sums of G s, G, and softplus(l) over the others. The diagonal's pairs are (i, i + diagonal) of
    rows and columns, dropped like those of equal ids.
    """
    lines = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    held = lines < n
    x_own = lines_of(own, lines, n, stride_own, D, BLOCK_D)
    scale_own = term(scale, lines, held, 0 if TRANSPOSED and SCALES == 2 else SCALES, 1.0)
    bias_own = tl.where(held, term(own_bias, lines, held, OWN_BIAS, 0.0), -float("inf"))
    top_own = tl.zeros((BLOCK_M,), tl.float32)
    weight_own = tl.zeros((BLOCK_M,), tl.float32) + 1.0
    if OWN:
        weight_own = tl.load(own_weight + lines, mask=held, other=0.0)
        if not SIGMOID:
            top_own = finite_or_zero(tl.load(own_max + lines, mask=held, other=0.0))
    id_own = lines
    if IDS:
        id_own = tl.load(own_ids + lines, mask=held, other=0)
    by = tl.load(unit) if UNIT else 1.0
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    sum_gs = tl.zeros((BLOCK_M,), tl.float32)
    sum_g = tl.zeros((BLOCK_M,), tl.float32)
    first = part * blocks_of_part
    last = tl.minimum(first + blocks_of_part, tl.cdiv(m, BLOCK_N))
    for j in range(first, last):
        others = j * BLOCK_N + tl.arange(0, BLOCK_N)
        there = others < m
        x_other = lines_of(other, others, m, stride_other, D, BLOCK_D)
        if UPCAST:  # the interpreter multiplies the bit patterns of bfloat16
            s = tl.dot(x_own.to(tl.float32), tl.trans(x_other).to(tl.float32))
        else:
            s = tl.dot(x_own, tl.trans(x_other), input_precision=PRECISION)
        s = zero_outside(s, lines, others, n, m)
        bias_other = term(other_bias, others, there, OTHER_BIAS, 0.0)
        bias_other = tl.where(there, bias_other, -float("inf"))
        # As in the statistics: the row's terms first, so that logits are rounded alike.
        if TRANSPOSED:
            scale_other = term(scale, others, there, 2 if SCALES == 2 else 0, 1.0)
            factor = scale_own[:, None] * scale_other[None, :]
            x = (s * factor + bias_other[None, :]) + bias_own[:, None]
        else:
            factor = tl.broadcast_to(scale_own[:, None], (BLOCK_M, BLOCK_N))
            x = (s * factor + bias_own[:, None]) + bias_other[None, :]
        if PAIRS:
            store_pairs(
                s, scale_own, bias_own, other_bias, diagonal, lines, others, n, m,
                pair_s, pair_logits, OTHER_BIAS > 0,
            )  # fmt: skip
        if DIAGONAL:  # noqa: SIM102 (the outer one is decided when compiling)
            if meets_diagonal(lines, others, diagonal):
                x = tl.where(others[None, :] == lines[:, None] + diagonal, -float("inf"), x)
        if IDS:
            id_other = tl.load(other_ids + others, mask=there, other=0)
            x = tl.where(id_own[:, None] == id_other[None, :], -float("inf"), x)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if SIGMOID:
            e = exp_above(-tl.abs(x), 0.0, FAST)
            if LOSS:
                loss += tl.sum(tl.maximum(x, 0.0) + log1p_of_unit(e), axis=1)
            g = tl.where(x > 0, 1.0, e) / (1.0 + e)
            if OWN:
                g *= weight_own[:, None]
            if OTHER:
                g *= tl.load(other_weight + others, mask=there, other=0.0)[None, :]
        else:
            if OWN:
                g += exp_above(x, top_own[:, None], FAST, BELOW=True) * weight_own[:, None]
            if OTHER:
                top = finite_or_zero(tl.load(other_max + others, mask=there, other=0.0))
                weight = tl.load(other_weight + others, mask=there, other=0.0)
                g += exp_above(x, top[None, :], FAST, BELOW=True) * weight[None, :]
        if SUM_GS:
            sum_gs += tl.sum(g * s, axis=1)
        if SUM_G:
            sum_g += tl.sum(g, axis=1)
        if PRODUCT:
            if SCALED:
                g *= factor
            if UNIT:
                g *= by
            total = product(g, x_other, total, SPLIT, PRECISION, UPCAST)
    at = part * n + lines
    if LOSS:
        tl.store(own_loss + at, loss, mask=held)
    if SUM_GS:
        tl.store(own_gs + at, sum_gs, mask=held)
    if SUM_G:
        tl.store(own_g + at, sum_g, mask=held)
    if PRODUCT:
        k = tl.arange(0, BLOCK_D)
        out = d_own + at.to(tl.int64)[:, None] * D_OUT + k[None, :]
        tl.store(out, total, mask=held[:, None] & (k < D_OUT)[None, :])
