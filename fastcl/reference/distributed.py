"""References across ranks: every rank gathers the whole batch, and computes all of its loss."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class WholeBatch:
    """The rows of all ranks of a group, rank by rank; this rank has those of `local`."""

    def __init__(self, group: Any, local: Tensor) -> None:
        self.group = group.get_group() if hasattr(group, "get_group") else group
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        own = torch.tensor([len(local)], device=local.device)
        counts = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(counts, own, group=self.group)
        self.counts = [int(count) for count in counts]
        stop = list(accumulate(self.counts))[rank]
        self.rows = slice(stop - len(local), stop)

    def gather(self, x: Tensor) -> Tensor:
        """All rows; the gradient is the sum over the ranks' losses."""
        gathered: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return gathered

    def ids(self, ids: Tensor | None) -> Tensor | None:
        """All ids."""
        return None if ids is None else self.gather(ids)

    def share(self, values: Tensor, reduction: str, views: int = 1) -> Tensor:
        """Of one value per anchor (`views` of a row, view by view), this rank's part.

        Reduced so that the mean over ranks is the loss of the whole batch.
        """
        total = sum(self.counts)
        own = values.reshape(views, total)[:, self.rows].reshape(-1)
        if reduction == "none":
            return own
        own = own.sum() * len(self.counts)
        return own / len(values) if reduction == "mean" else own


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: WholeBatch) -> Tensor:
        ctx.batch = batch
        padded = x.new_zeros(max(batch.counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in batch.counts]
        dist.all_gather(parts, padded, group=batch.group)
        return torch.cat([part[:n] for part, n in zip(parts, batch.counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.contiguous().clone()
        dist.all_reduce(whole, group=ctx.batch.group)
        return whole[ctx.batch.rows], None
