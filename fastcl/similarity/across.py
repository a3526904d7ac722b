"""Sums over a matrix whose rows lie on several ranks: each rank's own share of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.distributed import sigmoid, sums
from fastcl.distributed.ranks import Ranks
from fastcl.similarity.arguments import Arguments, check_stream


def weighted_logsumexp_across(u: Tensor, v: Tensor, ranks: Ranks, **how: Any) -> Tensor:
    """Sum over this rank's rows of log(1 + sum_j e^(l_ij - l_ii)), gradient made in the forward."""
    args = _check(u, v, **how)
    return sums.weighted_logsumexp(args.stream, args.backend, ranks)


def sigmoid_across(
    u: Tensor, v: Tensor, ranks: Ranks, *, bias: Tensor, by_row: bool, **how: Any
) -> Tensor:
    """The sigmoid loss of this rank's rows with all columns: by row, or their sum."""
    args = _check(u, v, **how)
    if args.needs[1] and not args.needs[0] and not by_row:
        args = args._replace(u=args.keys, v=args.u)  # a sum over pairs: send what needs no gradient
    args = args._replace(row_bias=bias)
    if not by_row and ranks.mode == "gather":
        return sums.sigmoid_sum(args.stream, args.backend, ranks)
    rows, logits = sigmoid.sigmoid_rows(args.stream, args.backend, ranks)
    rows = rows + torch.logaddexp(-logits, torch.zeros_like(logits))
    return (rows if by_row else rows.sum()).to(args.scale.dtype)


def _check(
    u: Tensor,
    v: Tensor,
    *,
    scale: Tensor,
    ids: Tensor | None,
    backend: str,
    workspace: int | None,
) -> Arguments:
    args = check_stream(
        u, v, scale, None, None, ids, ids, backend, workspace, may_be_empty=True, positives=0
    )
    return args._replace(diagonal=0)
