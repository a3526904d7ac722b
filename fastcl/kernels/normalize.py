"""L2 normalisation of rows and its gradient, in plain PyTorch a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.kernels.plan import row_slices

EPSILON = 1e-12
"""Norms below count as this: a row of zeros stays one. (As torch.nn.functional.normalize.)"""


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / norm of each row, the norms), computed in the accumulation dtype; y as wide as x."""
    dtype = accumulation_dtype(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm = x.new_empty(len(x), dtype=dtype)
    for part in row_slices(*x.shape):
        wide = x[part].to(dtype)
        norm[part] = torch.linalg.vector_norm(wide, dim=1).clamp_min(EPSILON)
        y[part] = wide / norm[part, None]
    return y, norm


def normalize_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """dx = (g - y <y, g>) / norm: what points along a row does not change its direction."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in row_slices(*x.shape):
        g, of_rows = grad[part].to(norm.dtype), norm[part, None]
        y = x[part].to(norm.dtype) / of_rows
        along = (y * g).sum(dim=1, keepdim=True).masked_fill_(of_rows <= EPSILON, 0.0)
        dx[part] = (g - y * along) / of_rows
    return dx
