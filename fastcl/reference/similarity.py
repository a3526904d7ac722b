"""References of the streamed primitives: the whole matrix, then one PyTorch call."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def logits_matrix(
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    diag_bias: Tensor | None = None,
) -> Tensor:
    """l_ij = scale_i <u_i, v_j> + row_bias_i + col_bias_j + diag_bias_i [i = j]."""
    dtype = torch.promote_types(accumulation_dtype(u), accumulation_dtype(v))
    with torch.autocast(u.device.type, enabled=False):
        logits = u.to(dtype) @ v.to(dtype).T
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(-1, 1)  # one number, or one per row
    logits = logits * scale
    if row_bias is not None:
        logits = logits + row_bias.to(dtype).reshape(-1, 1)
    if col_bias is not None:
        logits = logits + col_bias.to(dtype).reshape(1, -1)
    if diag_bias is not None:
        missing = logits.shape[0] - diag_bias.shape[0]  # rows below the last pair (i, i)
        biased = logits + F.pad(diag_bias.to(dtype), (0, missing)).reshape(-1, 1)
        logits = torch.where(diagonal_mask(logits, 0), biased, logits)
    return logits


def diagonal_mask(logits: Tensor, offset: int) -> Tensor:
    """True at the pairs (i, i + offset)."""
    rows = torch.arange(logits.shape[0], device=logits.device)
    cols = torch.arange(logits.shape[1], device=logits.device)
    return cols[None, :] == rows[:, None] + offset


def dropped_pairs(
    logits: Tensor, mask_diagonal: int | None, row_ids: Tensor | None, col_ids: Tensor | None
) -> Tensor:
    """True where a pair is left out: on the masked diagonal, or with equal ids."""
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    if mask_diagonal is not None:
        dropped = dropped | diagonal_mask(logits, mask_diagonal)
    if row_ids is not None and col_ids is not None:
        dropped = dropped | (row_ids[:, None] == col_ids[None, :])
    return dropped


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    # A fully masked line is -inf with gradient 0 (torch.logsumexp alone gives gradient NaN).
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    safe = torch.where(empty, torch.zeros_like(logits), logits)
    value = torch.logsumexp(safe, dim=dim)
    return torch.where(empty.squeeze(dim), torch.full_like(value, -torch.inf), value)


def similarity_logsumexp(
    u: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    diag_bias: Tensor | None = None,
    mask_diagonal: int | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    dim: Literal["rows", "cols", "both"] = "rows",
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of :func:`fastcl.similarity_logsumexp`."""
    if v is None:
        v = u
        col_ids = row_ids if col_ids is None else col_ids
    logits = logits_matrix(u, v, scale, row_bias, col_bias, diag_bias)
    logits = logits.masked_fill(dropped_pairs(logits, mask_diagonal, row_ids, col_ids), -torch.inf)
    if dim == "rows":
        return _logsumexp(logits, 1)
    if dim == "cols":
        return _logsumexp(logits, 0)
    return _logsumexp(logits, 1), _logsumexp(logits, 0)


def similarity_weighted_logsumexp(
    u: Tensor,
    v: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positives: int | None = None,
    add_zero: bool = False,
    divisor: int = 1,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Reference of :func:`fastcl.similarity_weighted_logsumexp`."""
    logits = logits_matrix(u, v, scale, row_bias, col_bias)
    dropped = dropped_pairs(logits, positives, row_ids, col_ids)
    if positives is not None:
        logits = logits - torch.diagonal(logits, positives)[:, None]
    logits = logits.masked_fill(dropped, -torch.inf)
    if add_zero or positives is not None:
        logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)
    values = _logsumexp(logits, 1)
    if weights is not None:
        values = values * weights.to(values.dtype)
    return values.sum() / divisor


def similarity_sigmoid(
    u: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    positives: int | None = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    reduction: Literal["sum", "rows"] = "sum",
    divisor: int = 1,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Reference of :func:`fastcl.similarity_sigmoid`."""
    logits = logits_matrix(u, v, scale, row_bias, col_bias) + bias
    loss = -F.logsigmoid(-logits)
    loss = loss.masked_fill(dropped_pairs(logits, None, row_ids, col_ids), 0.0)
    if positives is not None:
        loss = torch.where(diagonal_mask(logits, positives), -F.logsigmoid(logits), loss)
    rows = loss.sum(dim=1) / divisor
    return rows.sum() if reduction == "sum" else rows
