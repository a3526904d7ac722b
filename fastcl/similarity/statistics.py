"""What losses are made of: logsumexps over negatives, and the logits of positives."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastcl.distributed import softmax
from fastcl.distributed.ranks import Ranks
from fastcl.kernels import dispatch
from fastcl.similarity import ops
from fastcl.similarity.arguments import Arguments, check_stream
from fastcl.similarity.inputs import check_choice, check_transforms, check_workspace

Dim = Literal["rows", "cols", "both"]


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
    dim: Dim = "rows",
    backend: str = "auto",
    workspace: int | None = None,
    ranks: Ranks | None = None,
    local_ids: bool = False,
) -> Statistics:
    """Logsumexps over the negatives, and the logits of the positives, from one pass.

    The pairs (i, i + positives) are taken out of the stream. Their logits come back as a vector,
    whose gradient is added in float32 to the streamed one. This is what most losses are made of.

    `mirrored`, for v = u: the ids drop the pairs (i + positives, i) as well, so that the matrix
    stays symmetric, and half of it is enough.

    `ranks`: u and v are this rank's rows, and the statistics are over those of all ranks.
    `local_ids`, for v = u: the ids are of this rank's rows alone, and drop nothing elsewhere.
    """
    check_choice("dim", dim, ("rows", "cols", "both"))
    args = check_stream(
        u,
        v,
        scale,
        row_bias,
        col_bias,
        row_ids,
        col_ids,
        backend,
        workspace,
        mirrored=mirrored,
        may_be_empty=ranks is not None,
        positives=positives,
    )
    if args.backend == dispatch.REFERENCE:
        raise ValueError(
            'pair_statistics is a part of losses that backend="reference" does not have: ask the '
            "loss itself, or similarity_logsumexp, for its reference"
        )
    if ranks is not None:
        return _statistics_across(args, dim, ranks, local_ids)
    return line_statistics(args, dim)


def _statistics_across(args: Arguments, dim: Dim, ranks: Ranks, local_ids: bool) -> Statistics:
    own_ids = args.row_ids if local_ids else None
    if local_ids:
        args = args._replace(row_ids=None, col_ids=None)
    if args.v is None:
        rest, _, logits, top, _ = softmax.logsumexp(args.stream, args.backend, ranks, True, own_ids)
        both = LogSumExp(top, rest)
        return Statistics(both, both, logits)
    # The tower that is sent is the one without a gradient, if there is one: none goes back.
    swap = dim == "both" and args.needs[1] and not args.needs[0]
    if swap:
        args = args._replace(u=args.keys, v=args.u)
    rest, col_rest, logits, top, col_top = softmax.logsumexp(
        args.stream, args.backend, ranks, dim == "both"
    )
    rows, cols = LogSumExp(top, rest), LogSumExp(col_top, col_rest)
    return Statistics(cols, rows, logits) if swap else Statistics(rows, cols, logits)


def line_statistics(args: Arguments, dim: Dim) -> Statistics:
    """pair_statistics of a stream whose arguments are checked."""
    rows, cols = dim != "cols", dim != "rows"
    if args.v is None:  # symmetric: the columns are the rows
        rest, _, logits, top, *_ = ops.logsumexp(*args, True, False)
        both = LogSumExp(top.to(rest.dtype), rest)
        return Statistics(both, both, logits)
    rest, col_rest, logits, top, _, col_top, *_ = ops.logsumexp(*args, rows, cols)
    return Statistics(
        LogSumExp(top.to(rest.dtype), rest), LogSumExp(col_top.to(col_rest.dtype), col_rest), logits
    )


def is_reference(backend: str, like: Tensor, workspace: int | None) -> bool:
    """Whether the reference will compute this, whole matrix and all, whatever the workspace."""
    check_workspace(workspace, 0)
    return dispatch.resolve(backend, like.device) == dispatch.REFERENCE


def pair_logits(query: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """Logits of each query with its own key [N, D], or with its own keys [N, M, D]."""
    check_transforms(query, keys, scale)
    similarities: Tensor = ops.pair_similarity(query, keys)
    return scale.to(similarities.dtype) * similarities
