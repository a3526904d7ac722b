"""The pairwise sigmoid loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastcl import reference
from fastcl.kernels import dispatch
from fastcl.similarity import ops
from fastcl.similarity.arguments import check_stream
from fastcl.similarity.inputs import check_choice, check_divisor, check_number, check_transforms


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
    r"""Pairwise sigmoid loss over a similarity matrix, without the matrix.

    .. math:: -\sum_{ij} \log \sigma(y_{ij} l_{ij}), \qquad
        l_{ij} = \mathrm{scale}_i \langle u_i, v_j \rangle + \mathrm{bias} + \mathrm{row\_bias}_i
        + \mathrm{col\_bias}_j

    with y = +1 at the pairs (i, i + positives) and -1 elsewhere. `reduction="sum"` makes loss and
    gradients from one pass (three products); "rows" takes one forward and three backward.

    Args:
        u: [N, D]; v: [M, D]; float32, bfloat16, float16 or float64.
        scale: a float, a tensor with one element, or [N]. Differentiable.
        bias: a float or a tensor with one element. Differentiable.
        row_bias, col_bias: [N] and [M], added to the logits. Differentiable.
        positives: column of row 0's positive, 0 for paired rows; None: there are none.
        row_ids, col_ids: integers [N] and [M]; pairs with equal ids are left out, except positives.
        reduction: "sum" -> 0-dim; "rows" -> [N], each row's sum over its columns.
        divisor: divide the result by this count; a 16-bit gradient is then rounded once.
        backend, workspace: as for :func:`similarity_logsumexp`.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or choices that do not fit.

    Example:
        >>> import fastcl, torch
        >>> u, v = torch.randn(6, 4), torch.randn(6, 4)
        >>> fastcl.similarity_sigmoid(u, v, scale=10.0, bias=-10.0).shape
        torch.Size([])

    Source: SigLIP (Zhai et al. 2023, section 3.2, eq. 1), before the division by N.
    """
    check_choice("reduction", reduction, ("sum", "rows"))
    divisor = check_divisor(divisor)
    if v is None:
        raise TypeError("v must be a tensor [M, D]")
    args = check_stream(
        u, v, scale, row_bias, col_bias, row_ids, col_ids, backend, workspace, positives=positives
    )
    bias = check_number("bias", bias, args.u)
    if args.backend == dispatch.REFERENCE:
        return reference.similarity_sigmoid(
            args.u,
            args.keys,
            **args.logits,
            bias=bias,
            positives=args.diagonal,
            reduction=reduction,
            divisor=divisor,
        )
    check_transforms(bias)
    # A bias for all pairs is a row bias with one element.
    args = args._replace(row_bias=bias if args.row_bias is None else bias + args.row_bias)
    if reduction == "sum":
        total: Tensor = ops.sigmoid_sum(*args, divisor, args.needs)[0]
        return total
    rows: Tensor
    rows, logits, _ = ops.sigmoid_rows(*args)
    if args.diagonal is not None:
        positive_loss = torch.logaddexp(-logits, torch.zeros_like(logits))
        padding = rows.new_zeros(rows.shape[0] - logits.shape[0])
        rows = rows + torch.cat([positive_loss, padding])
    return rows.to(args.scale.dtype) / divisor
