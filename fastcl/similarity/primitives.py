"""The streamed primitives: a few statistics of a similarity matrix that is never stored."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastcl import reference
from fastcl.kernels import dispatch
from fastcl.similarity import ops
from fastcl.similarity.inputs import (
    check_choice,
    check_divisor,
    check_embeddings,
    check_ids,
    check_number,
    check_scale,
    check_transforms,
    check_vector,
    check_workspace,
)


class _Arguments(NamedTuple):
    """A stream's arguments as the operators take them, checked and in their final dtypes."""

    u: Tensor
    v: Tensor | None
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    diagonal: int | None
    backend: str
    workspace: int

    @property
    def needs(self) -> list[bool]:
        """Which of u, v, scale, row_bias, col_bias want a gradient now."""
        on = torch.is_grad_enabled()
        return [on and x is not None and x.requires_grad for x in self[:5]]


def _arguments(
    u: Tensor,
    v: Tensor | None,
    scale: float | Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    diagonal: int | None,
    backend: str,
    workspace: int | None,
    mirrored: bool = False,
    diagonal_name: str = "positives",
) -> _Arguments:
    own_ids = col_ids is not None and col_ids is not row_ids
    if v is None:
        (u,) = check_embeddings(u=u)
        col_ids = row_ids if col_ids is None else col_ids
    else:
        u, v = check_embeddings(u=u, v=v)
    n, m = u.shape[0], (u if v is None else v).shape[0]
    if (row_ids is None) != (col_ids is None):
        given, missing = ("row_ids", "col_ids") if col_ids is None else ("col_ids", "row_ids")
        raise ValueError(f"{given} is given without {missing}: ids of both sides are compared")
    if diagonal is not None:
        if isinstance(diagonal, bool) or not isinstance(diagonal, (int, torch.SymInt)):
            given = type(diagonal).__name__
            raise TypeError(f"{diagonal_name} must be an int or None, not {given}")
        if diagonal < 0 or diagonal >= m:
            raise ValueError(
                f"{diagonal_name} is {diagonal}; expected 0 to {m - 1}, the column of row 0's pair"
            )
    scale = check_scale("scale", scale, u)
    row_bias = check_vector("row_bias", row_bias, n, u)
    col_bias = check_vector("col_bias", col_bias, m, u)
    name = dispatch.resolve(backend, u.device)
    default = 0 if name == dispatch.REFERENCE else dispatch.get(name).default_workspace
    if name != dispatch.REFERENCE:
        check_transforms(u, v, scale, row_bias, col_bias)
    lopsided = scale.dim() or row_bias is not None or col_bias is not None or own_ids
    if v is None and (lopsided or (diagonal and not mirrored)):
        v = u  # the matrix of logits is not symmetric: all of it is needed
    return _Arguments(
        u,
        v,
        scale,
        row_bias,
        col_bias,
        check_ids("row_ids", row_ids, n, u),
        check_ids("col_ids", col_ids, m, u),
        diagonal,
        name,
        check_workspace(workspace, default),
    )


class LogSumExp(NamedTuple):
    """Logsumexps in two parts: the largest logits, and the rest above them.

    In float64 (where the device has it). Apart, because their sum would round away what a small
    loss consists of; `top` carries no gradient.
    """

    top: Tensor
    rest: Tensor

    def minus(self, logits: Tensor) -> Tensor:
        """Relative to these logits: exact where they are close to the top."""
        return (self.top - logits) + self.rest

    def whole(self) -> Tensor:
        """The logsumexps as one number each."""
        return self.top + self.rest

    @staticmethod
    def of(logits: Tensor) -> LogSumExp:
        """Of the rows of a matrix of logits, which is there anyway."""
        top = logits.detach().amax(dim=1)
        return LogSumExp(top, torch.exp(logits - top[:, None]).sum(dim=1).log())


class Statistics(NamedTuple):
    """What one pass over the matrix yields; empty tensors where not asked for."""

    rows: LogSumExp
    cols: LogSumExp
    positives: Tensor


def pair_statistics(
    u: Tensor,
    v: Tensor | None,
    *,
    scale: float | Tensor,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    positives: int | None = None,
    mirrored: bool = False,
    dim: Literal["rows", "cols", "both"] = "rows",
    backend: str = "auto",
    workspace: int | None = None,
) -> Statistics:
    """Logsumexps over the negatives, and the logits of the positives, from one pass.

    The pairs (i, i + positives) are taken out of the stream. Their logits come back as a vector,
    whose gradient is added in float32 to the streamed one. This is what most losses are made of.

    `mirrored`, for v = u: the ids drop the pairs (i + positives, i) as well, so that the matrix
    stays symmetric, and half of it is enough.
    """
    check_choice("dim", dim, ("rows", "cols", "both"))
    args = _arguments(
        u, v, scale, row_bias, col_bias, row_ids, col_ids, positives, backend, workspace, mirrored
    )
    rows, cols = dim != "cols", dim != "rows"
    if args.v is None:  # symmetric: the columns are the rows
        rest, _, logits, top, *_ = ops.logsumexp(*args, True, False)
        both = LogSumExp(top.to(rest.dtype), rest)
        return Statistics(both, both, logits)
    rest, col_rest, logits, top, _, col_top, *_ = ops.logsumexp(*args, rows, cols)
    return Statistics(
        LogSumExp(top.to(rest.dtype), rest), LogSumExp(col_top.to(col_rest.dtype), col_rest), logits
    )


def is_reference(backend: str, like: Tensor) -> bool:
    """Whether the reference will compute this, whole matrix and all."""
    return dispatch.resolve(backend, like.device) == dispatch.REFERENCE


def pair_logits(query: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """Logits of each query with its own key [N, D], or with its own keys [N, M, D]."""
    check_transforms(query, keys, scale)
    similarities: Tensor = ops.pair_similarity(query, keys)
    return scale.to(similarities.dtype) * similarities


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
        backend: "auto", "reference", "torch" or "cpu".
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
    how = (u, v, scale, row_bias, col_bias, row_ids, col_ids, bias_at, backend, workspace)
    args = _arguments(*how, diagonal_name="mask_diagonal")
    if args.backend == dispatch.REFERENCE:
        return reference.similarity_logsumexp(
            args.u,
            args.v,
            scale=args.scale,
            row_bias=args.row_bias,
            col_bias=args.col_bias,
            diag_bias=diag_bias,
            mask_diagonal=mask_diagonal,
            row_ids=args.row_ids,
            col_ids=args.col_ids,
            dim=dim,
        )
    statistics = pair_statistics(
        u,
        v,
        scale=scale,
        row_bias=row_bias,
        col_bias=col_bias,
        row_ids=row_ids,
        col_ids=col_ids,
        positives=bias_at,
        dim=dim,
        backend=backend,
        workspace=workspace,
    )
    rows, cols = statistics.rows.whole(), statistics.cols.whole()
    if diag_bias is not None:
        logits = statistics.positives
        if v is None and col_ids is None:
            col_ids = row_ids
        dropped = _dropped_by_id(logits, row_ids, col_ids)
        bias = check_vector("diag_bias", diag_bias, len(dropped), logits)
        assert bias is not None
        logits = (logits + bias).masked_fill(dropped, -torch.inf)
        rows = _put_back(rows, logits) if dim != "cols" else rows
        cols = _put_back(cols, logits) if dim != "rows" else cols
    double = torch.float64 in (u.dtype, u.dtype if v is None else v.dtype)
    dtype = torch.float64 if double else torch.float32
    if dim == "both":
        return rows.to(dtype), cols.to(dtype)
    return (rows if dim == "rows" else cols).to(dtype)


def _dropped_by_id(pairs: Tensor, row_ids: Tensor | None, col_ids: Tensor | None) -> Tensor:
    """Which of the pairs (i, i) have equal ids."""
    if row_ids is None or col_ids is None:
        return torch.zeros_like(pairs, dtype=torch.bool)
    count = len(pairs)
    return row_ids[:count].to(pairs.device) == col_ids[:count].to(pairs.device)


def _put_back(lines: Tensor, logits: Tensor) -> Tensor:
    """Adds one logit to each of the first lines' logsumexps."""
    count = len(logits)
    # Of two empty sides (-inf) logaddexp has gradient NaN; the result is -inf all the same.
    empty = (lines[:count] == -torch.inf) & (logits == -torch.inf)
    merged = torch.logaddexp(lines[:count].masked_fill(empty, 0.0), logits.masked_fill(empty, 0.0))
    return torch.cat([merged.masked_fill(empty, -torch.inf), lines[count:]])


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
    r"""Weighted sum of row logsumexps, whose gradient is made together with its value.

    .. math:: \sum_i w_i \log \sum_j e^{l_{ij}}, \qquad
        \text{or with positives:}\quad \sum_i w_i \log\Bigl(1 + \sum_j e^{l_{ij} - l_{i,i+p}}\Bigr)

    As the weights are known before the first tile, each row of tiles can be turned into its
    gradient while it is there: three products in all where a few hundred full rows fit the
    workspace, four where they do not, and two where only `u` needs a gradient.

    Args:
        u: [N, D]; v: [M, D]; float32, bfloat16, float16 or float64.
        weights: [N], or None for ones. Differentiable.
        scale, row_bias, col_bias, row_ids, col_ids, backend, workspace: as for
            :func:`similarity_logsumexp`.
        positives: p, where the pairs (i, i + p) are each row's positive: they leave the sum, and
            the other logits are taken relative to theirs. This is InfoNCE, exact however small.
        add_zero: with no positives, add a logit 0 to every row (pass minus the positive's logit as
            `row_bias` for positives that are not rows of v).
        divisor: divide the sum by this count; a 16-bit gradient is then rounded once.

    Returns:
        A 0-dim tensor, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or choices that do not fit.

    Example:
        >>> import fastcl, torch
        >>> q, k = torch.randn(6, 4), torch.randn(6, 4)
        >>> loss = fastcl.similarity_weighted_logsumexp(q, k, scale=10.0, positives=0, divisor=6)
        >>> torch.allclose(loss, fastcl.info_nce(q, k, temperature=0.1))
        True

    Source: van den Oord et al. 2018, eq. 4; gradient in the forward as in Cut Cross Entropy
    (Wijmans et al. 2024) and Liger's fused linear cross-entropy.
    """
    if v is None:
        raise TypeError("v must be a tensor [M, D]; similarity_logsumexp serves v = u")
    args = _arguments(
        u, v, scale, row_bias, col_bias, row_ids, col_ids, positives, backend, workspace
    )
    if positives is not None:
        if row_bias is not None:
            raise ValueError("row_bias has no effect with positives: it cancels in l_ij - l_ii")
        if args.u.shape[0] + positives > v.shape[0]:
            raise ValueError(
                f"positives={positives} puts row {args.u.shape[0] - 1}'s positive past the last of "
                f"v's {v.shape[0]} rows; expected at least {args.u.shape[0] + positives} rows"
            )
    check_divisor(divisor)
    weights = check_vector("weights", weights, args.u.shape[0], args.u)
    if add_zero and row_bias is not None:  # enters after the stream: kept as exact as it came
        args = args._replace(row_bias=row_bias.to(args.u.device))
    if args.backend == dispatch.REFERENCE:
        return reference.similarity_weighted_logsumexp(
            args.u,
            v,
            weights,
            scale=args.scale,
            row_bias=args.row_bias,
            col_bias=args.col_bias,
            row_ids=args.row_ids,
            col_ids=args.col_ids,
            positives=positives,
            add_zero=add_zero,
            divisor=divisor,
        )
    total: Tensor = ops.weighted_logsumexp(*args, weights, divisor, add_zero, args.needs)[0]
    return total


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
    check_divisor(divisor)
    if v is None:
        raise TypeError("v must be a tensor [M, D]")
    u, v = check_embeddings(u=u, v=v)
    all_bias = check_number("bias", bias, u)
    extra = check_vector("row_bias", row_bias, u.shape[0], u)
    args = _arguments(u, v, scale, None, col_bias, row_ids, col_ids, positives, backend, workspace)
    # A bias for all pairs is a row bias with one element.
    args = args._replace(row_bias=all_bias if extra is None else all_bias + extra)
    if args.backend == dispatch.REFERENCE:
        return reference.similarity_sigmoid(
            args.u,
            v,
            scale=args.scale,
            bias=all_bias,
            row_bias=extra,
            col_bias=args.col_bias,
            positives=positives,
            row_ids=args.row_ids,
            col_ids=args.col_ids,
            reduction=reduction,
            divisor=divisor,
        )
    if reduction == "sum":
        total: Tensor = ops.sigmoid_sum(*args, divisor, args.needs)[0]
        return total
    rows: Tensor
    rows, logits, _ = ops.sigmoid_rows(*args)
    if positives is not None:
        positive_loss = torch.logaddexp(-logits, torch.zeros_like(logits))
        padding = rows.new_zeros(rows.shape[0] - logits.shape[0])
        rows = rows + torch.cat([positive_loss, padding])
    return rows.to(args.scale.dtype) / divisor
