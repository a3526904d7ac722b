"""What losses, queues and clustering across ranks are made of, for use on its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed import collectives
from fastcl.distributed.meeting import Meeting
from fastcl.distributed.ranks import Ranks, check_options
from fastcl.distributed.team import Group
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
        facts = {"x": x, "shape": tuple(x.shape[1:]), "reduce_dtype": reduce_dtype}
        ranks = meeting.agree(x.flatten(1), **facts)
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
        meeting.agree_on_rows(1, shape=tuple(x.shape), dtype=x.dtype)
    out = x.detach().clone()
    with meeting.team.watched("a sum over ranks"):
        work = dist.all_reduce(out, group=meeting.team.group, async_op=True)
        assert work is not None
        meeting.team.wait(work, out)
    return out


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, not {type(x).__name__}")
