"""What losses, queues and clustering across ranks are made of, for use on its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed import collectives
from fastcl.distributed.meeting import Meeting
from fastcl.distributed.ranks import Ranks, check_options
from fastcl.distributed.team import Group, Team
from fastcl.distributed.walk import Once
from fastcl.kernels.dtypes import accumulation_dtype


def gather_rows(x: Tensor, group: Group, *, reduce_dtype: torch.dtype | None = None) -> Tensor:
    """The rows of all ranks, rank by rank, with their gradient.

    .. math:: \\mathrm{out} = [x_0; x_1; \\dots; x_{W-1}], \\qquad
        \\frac{\\partial L}{\\partial x_r} = \\sum_s \\frac{\\partial L_s}{\\partial x_r}

    The gradient is the sum over the ranks' losses L_s, so that after DDP's mean it is that of their
    mean. It is summed in float32 (float64 for float64) however it is sent.

    Args:
        x: [n_r, ...] of any dtype; the ranks may have different numbers of rows, or none.
        group: process group or one-dimensional device mesh.
        reduce_dtype: dtype in which gradients are sent; None: as they are summed.

    Returns:
        [N, ...], N = sum of n_r.

    Raises:
        RanksDisagree: where shapes beside the rows, or dtypes, differ between ranks.
        RankLost: where not all ranks come within the timeout.

    Example:
        >>> import fastcl, torch
        >>> # on each rank, its own hard negatives as negatives of all:
        >>> # keys = fastcl.distributed.gather_rows(own_negatives, torch.distributed.group.WORLD)

    Source: the collective is torch.distributed's all-gather; its gradient, a reduce-scatter.
    """
    with Meeting(group, "gather_rows") as meeting:
        _check(x)
        check_options("gather", reduce_dtype)
        if x.dim() == 0:
            raise ValueError("x has no rows (0-dim); expected [n_r, ...], such as x[None]")
        facts = {"shape": tuple(x.shape[1:]), "dtype": x.dtype, "device": x.device.type, "x": x}
        counts = meeting.agree_on_rows(len(x), **facts, reduce_dtype=reduce_dtype)
        meeting.team.open_for(x.device)
    if sum(counts) == 0:
        return x
    ranks = Ranks(meeting.team, counts, "gather", reduce_dtype)
    out: Tensor = _Gather.apply(x, ranks)  # type: ignore[no-untyped-call]
    return out


class _Gather(Once):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.device_type, ctx.gradients, ctx.ranks = x.device.type, _gather_gradient, ranks
        return collectives.gather_rows(x, ranks)


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    wide = grad.to(accumulation_dtype(grad.dtype))
    return collectives.sum_to_owners(wide, ctx.ranks).to(grad.dtype), None


def row_counts(rows: int, group: Group) -> tuple[int, ...]:
    """How many rows each rank has; their sum is the true size of the batch.

    Nothing waits for a GPU: the numbers go over a gloo group of the same ranks.

    Args:
        rows: this rank's number, 0 or more.
        group: process group or one-dimensional device mesh.

    Raises:
        RankLost: where not all ranks come within the timeout.

    Example:
        >>> import fastcl
        >>> # counts = fastcl.distributed.row_counts(len(batch), torch.distributed.group.WORLD)
    """
    with Meeting(group, "row_counts") as meeting:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise ValueError(f"rows is {rows!r}; expected a number of rows, 0 or more")
        return meeting.agree_on_rows(rows)


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """The sum of a tensor over all ranks, the same bits on each; without gradient.

    Args:
        x: any shape and floating dtype, the same on all ranks.
        group: process group or one-dimensional device mesh.

    Raises:
        RanksDisagree: where shapes or dtypes differ between ranks.
        RankLost: where not all ranks come within the timeout.

    Example:
        >>> import fastcl
        >>> # column_sums = fastcl.distributed.sum_over_ranks(sums, torch.distributed.group.WORLD)
    """
    with Meeting(group, "sum_over_ranks") as meeting:
        _check(x)
        _agree_on_all(meeting, x)
    return _all_reduced(x.detach(), dist.ReduceOp.SUM, meeting.team)


def logsumexp_over_ranks(x: Tensor, group: Group) -> Tensor:
    """The logsumexp over ranks of partial logsumexps, the same bits on each; without gradient.

    .. math:: \\log \\sum_r e^{x_r}

    Args:
        x: any shape and floating dtype, the same on all ranks: logsumexps of each one's part; -inf
            for nothing.
        group: process group or one-dimensional device mesh.

    Raises:
        RanksDisagree: where shapes or dtypes differ between ranks.
        RankLost: where not all ranks come within the timeout.

    Example:
        >>> import fastcl
        >>> # columns = fastcl.distributed.logsumexp_over_ranks(own, torch.distributed.group.WORLD)
    """
    with Meeting(group, "logsumexp_over_ranks") as meeting:
        _check(x)
        _agree_on_all(meeting, x)
    x = x.detach()
    top = _all_reduced(x, dist.ReduceOp.MAX, meeting.team)
    finite = torch.where(top == -torch.inf, torch.zeros_like(top), top)  # of nothing: no NaN
    return finite + _all_reduced(torch.exp(x - finite), dist.ReduceOp.SUM, meeting.team).log()


def _agree_on_all(meeting: Meeting, x: Tensor) -> None:
    facts = {"shape": tuple(x.shape), "dtype": x.dtype, "device": x.device.type}
    meeting.agree_on_rows(1, **facts)


def _all_reduced(x: Tensor, how: Any, team: Team) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)  # strides may differ between ranks
    with team.watched("a reduction over ranks"):
        work = dist.all_reduce(out, how, group=team.group, async_op=True)
        assert work is not None
        team.wait(work, out)
    return out


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, not {type(x).__name__}")
