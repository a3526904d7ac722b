"""The logsumexps of a matrix's lines."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastcl import reference
from fastcl.kernels import dispatch
from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.similarity.arguments import check_stream
from fastcl.similarity.inputs import check_choice, check_vector
from fastcl.similarity.statistics import line_statistics


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
    r"""Logsumexp of a similarity matrix by rows, by columns, or both, without the matrix.

    .. math::
        l_{ij} = \mathrm{scale}_i \langle u_i, v_j \rangle + \mathrm{row\_bias}_i
                 + \mathrm{col\_bias}_j + \mathrm{diag\_bias}_i\,[i = j], \qquad
        \mathrm{rows}_i = \log \sum_j e^{l_{ij}}, \quad \mathrm{cols}_j = \log \sum_i e^{l_{ij}}

    over the pairs that no mask drops. A line of which everything is dropped gives -inf, with
    gradient 0. One product forward and three backward (half of each where `v` is None); extra
    memory O(N + M) and the workspace.

    Args:
        u: [N, D] float32, bfloat16, float16 or float64.
        v: [M, D], or None for v = u, where S is symmetric and only half of it is made.
        scale: a float, a tensor with one element, or [N], one per row. Differentiable.
        row_bias, col_bias: [N] and [M], added to the logits. Differentiable.
        diag_bias: [min(N, M)], added to the logits of the pairs (i, i). Differentiable.
        mask_diagonal: drop the pairs (i, i + mask_diagonal); 0 drops each row's own index.
        row_ids, col_ids: integers [N] and [M]; pairs with equal ids are dropped.
        dim: "rows" -> [N], "cols" -> [M], "both" -> a tuple of the two, from one pass.
        backend: "auto", "reference", "torch", "cpu" or "triton".
        workspace: bytes that the tiles may take; None means 256 MiB, of which a pass over tiles
            uses some 8 MiB.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or choices that do not fit.

    Example:
        >>> import fastcl, torch
        >>> u, v = torch.randn(6, 4), torch.randn(8, 4)
        >>> rows, cols = fastcl.similarity_logsumexp(u, v, scale=10.0, dim="both")
        >>> rows.shape, cols.shape
        (torch.Size([6]), torch.Size([8]))

    Source: the statistic of InfoNCE (van den Oord et al. 2018, eq. 4) and CLIP (Radford et al.
    2021, figure 3); streaming as in Milakov and Gimelshein 2018, algorithm 3.
    """
    check_choice("dim", dim, ("rows", "cols", "both"))
    bias_at = mask_diagonal if diag_bias is None else 0
    if diag_bias is not None and mask_diagonal is not None:
        if mask_diagonal == 0:
            raise ValueError("diag_bias has no effect with mask_diagonal=0: its pairs are dropped")
        raise ValueError(
            "diag_bias and mask_diagonal cannot be given together; drop pairs by id instead"
        )
    args = check_stream(
        u, v, scale, row_bias, col_bias, row_ids, col_ids, backend, workspace, mask_diagonal=bias_at
    )
    if args.backend == dispatch.REFERENCE:
        count = min(len(args.u), len(args.keys))
        diag_bias = check_vector("diag_bias", diag_bias, count, args.u)
        mask = args.diagonal if diag_bias is None else None
        return reference.similarity_logsumexp(
            args.u, args.v, **args.logits, diag_bias=diag_bias, mask_diagonal=mask, dim=dim
        )
    statistics = line_statistics(args, dim)
    rows, cols = statistics.rows.whole(), statistics.cols.whole()
    if diag_bias is not None:
        logits = statistics.positives
        dropped = _dropped_by_id(logits, args.row_ids, args.col_ids)
        bias = check_vector("diag_bias", diag_bias, len(dropped), logits)
        assert bias is not None
        logits = (logits + bias).masked_fill(dropped, -torch.inf)
        rows = _put_back(rows, logits) if dim != "cols" else rows
        cols = _put_back(cols, logits) if dim != "rows" else cols
    dtype = accumulation_dtype(args.u.dtype)
    if dim == "both":
        return rows.to(dtype), cols.to(dtype)
    return (rows if dim == "rows" else cols).to(dtype)


def _dropped_by_id(pairs: Tensor, row_ids: Tensor | None, col_ids: Tensor | None) -> Tensor:
    """Which of the pairs (i, i) have equal ids."""
    if row_ids is None or col_ids is None:
        return torch.zeros_like(pairs, dtype=torch.bool)
    count = len(pairs)
    return row_ids[:count] == col_ids[:count]


def _put_back(lines: Tensor, logits: Tensor) -> Tensor:
    """Adds one logit to each of the first lines' logsumexps."""
    count = len(logits)
    # Of two empty sides (-inf) logaddexp has gradient NaN; the result is -inf all the same.
    empty = (lines[:count] == -torch.inf) & (logits == -torch.inf)
    merged = torch.logaddexp(lines[:count].masked_fill(empty, 0.0), logits.masked_fill(empty, 0.0))
    return torch.cat([merged.masked_fill(empty, -torch.inf), lines[count:]])
