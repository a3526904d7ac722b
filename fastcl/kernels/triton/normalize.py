"""L2 normalisation of rows and its gradient: each one launch, nothing kept in float32 but norms."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels.normalize import EPSILON
from fastcl.kernels.triton.support import interpreted, on_device


@triton.jit(do_not_specialize=["n"])
def rows_normalized(
    x, y, norm, n, stride_x, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """y = x / max(|x|, EPS), and that norm, of a few rows, which are read twice."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLS)
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + k[None, :]
    y_at = y + rows.to(tl.int64)[:, None] * D + k[None, :]
    inside = (rows < n)[:, None]
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, D, COLS):
        part = tl.load(x_at + start, mask=inside & (k < D - start)[None, :], other=0.0)
        squares += part.to(tl.float32) * part.to(tl.float32)
    size = tl.sqrt_rn(tl.sum(squares, axis=1))
    size = tl.maximum(size, EPS, propagate_nan=tl.PropagateNan.ALL)
    tl.store(norm + rows, size, mask=rows < n)
    for start in range(0, D, COLS):
        here = inside & (k < D - start)[None, :]
        part = tl.load(x_at + start, mask=here, other=0.0).to(tl.float32)
        unit = tl.div_rn(part, tl.broadcast_to(size[:, None], (ROWS, COLS)))
        tl.store(y_at + start, unit.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["n"])
def rows_normalized_gradient(
    g, x, norm, dx, n, stride_g, stride_x, D: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """dx = (g - y <y, g>) / norm, where y = x / norm; without the projection at norms of EPS."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLS)
    g_at = g + rows.to(tl.int64)[:, None] * stride_g + k[None, :]
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + k[None, :]
    dx_at = dx + rows.to(tl.int64)[:, None] * D + k[None, :]
    inside = (rows < n)[:, None]
    size = tl.load(norm + rows, mask=rows < n, other=1.0)
    products = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, D, COLS):
        here = inside & (k < D - start)[None, :]
        y = tl.load(x_at + start, mask=here, other=0.0).to(tl.float32) / size[:, None]
        products += y * tl.load(g_at + start, mask=here, other=0.0).to(tl.float32)
    along = tl.where(size <= EPS, 0.0, tl.sum(products, axis=1))
    for start in range(0, D, COLS):
        here = inside & (k < D - start)[None, :]
        y = tl.load(x_at + start, mask=here, other=0.0).to(tl.float32) / size[:, None]
        across = tl.load(g_at + start, mask=here, other=0.0).to(tl.float32) - y * along[:, None]
        tl.store(dx_at + start, (across / size[:, None]).to(dx.dtype.element_ty), mask=here)


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / norm of each row, the norms in float32)."""
    x = _rows_contiguous(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm = x.new_empty(len(x), dtype=torch.float32)
    with on_device(x.device):
        rows_normalized[_grid(x)](x, y, norm, len(x), x.stride(0), **_shape(x))
    return y, norm


def normalize_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """dx = (g - y <y, g>) / norm."""
    grad, x = _rows_contiguous(grad), _rows_contiguous(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    with on_device(x.device):
        rows_normalized_gradient[_grid(x)](
            grad, x, norm, dx, len(x), grad.stride(0), x.stride(0), **_shape(x)
        )
    return dx


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[int]:
    return (-(-len(x) // rows_at_a_time(x.shape[1])["ROWS"]),)


def _shape(x: Tensor) -> dict[str, Any]:
    return {"D": x.shape[1], **rows_at_a_time(x.shape[1])}


def rows_at_a_time(dim: int) -> dict[str, Any]:
    """A program's rows, and how much of them it holds at a time."""
    cols = min(1024, triton.next_power_of_2(dim))
    return {"ROWS": 64 if interpreted() else 4, "COLS": cols, "EPS": EPSILON}
