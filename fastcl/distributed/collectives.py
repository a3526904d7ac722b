"""Rows and sums between ranks, uneven numbers of rows included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.ranks import Ranks
from fastcl.kernels.dtypes import accumulation_dtype

# PyTorch 2.13 has new names for these two; 2.11 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes: what is only carried needs no dtype that the carrier knows."""
    x = x.contiguous()
    return (x if x.dim() else x[None]).view(torch.uint8)


def gather_rows(x: Tensor, ranks: Ranks) -> Tensor:
    """Everyone's rows [n_r, ...], rank by rank: [N, ...]. No gradient."""
    most, counts = max(ranks.counts), ranks.counts
    even = min(counts) == most
    padded = x if even else x.new_zeros(most, *x.shape[1:])
    if not even:
        padded[: len(x)] = x
    out = x.new_empty(ranks.size * most, *x.shape[1:])
    with ranks.team.watched("gathering rows"):
        work = _all_gather(_bytes(out), _bytes(padded), group=ranks.team.group, async_op=True)
        ranks.team.wait(work, out)
    if even:
        return out
    return torch.cat([out[most * s : most * s + n] for s, n in enumerate(counts)])


def send_to_owners(x: Tensor, sent: list[int], came: list[int], ranks: Ranks) -> list[Tensor]:
    """Consecutive rows of x, sent[s] of them to rank s; what came, came[s] rows from rank s."""
    out = x.new_empty(sum(came), *x.shape[1:])
    with ranks.team.watched("exchanging rows"):
        work = dist.all_to_all_single(
            _bytes(out), _bytes(x), came, sent, group=ranks.team.group, async_op=True
        )
        ranks.team.wait(work, out)
    return list(torch.split(out, came))


def sum_to_owners(x: Tensor, ranks: Ranks) -> Tensor:
    """Reduce-scatter of rows [N, ...]: the sum over ranks of this rank's rows, [n_r, ...].

    Sums are in the dtype of x, in the order of the ranks, however it is sent (`reduce_dtype`): each
    number is then rounded once. On a GPU, sums of even batches as they are sent are NCCL's own.
    """
    counts, dtype = list(ranks.counts), ranks.reduce_dtype or x.dtype
    even, group = min(counts) == max(counts), ranks.team.group
    if dtype == x.dtype and even and not x.is_cpu:
        out = x.new_empty(counts[0], *x.shape[1:])
        with ranks.team.watched("summing rows"):
            ranks.team.wait(_reduce_scatter(out, x, group=group, async_op=True), out)
        return out
    own = [counts[ranks.rank]] * ranks.size
    return total(send_to_owners(x.to(dtype), counts, own, ranks), x.dtype)


def total(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Their sum in that dtype, in order."""
    out = parts[0].to(dtype, copy=True)
    for part in parts[1:]:
        out += part
    return out


@dataclass
class Transfer:
    """What is on its way from one rank, while something else is on its way to another."""

    ranks: Ranks
    works: list[dist.Work]
    held: tuple[Tensor | None, ...]  # memory that is being read or written
    came: Tensor

    def wait(self) -> Tensor:
        """What came, once it is there and what was sent is gone."""
        with self.ranks.team.watched("passing on a block"):
            for work in self.works:
                self.ranks.team.wait(work, self.came)
        self.works, self.held = [], ()
        return self.came


def pass_on(x: Tensor | None, to: int, room: Tensor, origin: int, ranks: Ranks) -> Transfer:
    """Starts sending x to one rank and filling `room` from another; nothing empty is sent."""
    group, operations, sent = ranks.team.group, [], x
    if x is not None and x.numel() and to != ranks.rank:
        sent = _bytes(x)
        operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=to))
    if room.numel() and origin != ranks.rank:
        operations.append(dist.P2POp(dist.irecv, _bytes(room), group=group, group_peer=origin))
    with ranks.team.watched("passing on a block"):
        works = dist.batch_isend_irecv(operations) if operations else []
    return Transfer(ranks, works, (sent, room), room)


def wire_dtype(dtype: torch.dtype, ranks: Ranks) -> torch.dtype:
    """In which dtype gradients of embeddings of `dtype` are sent."""
    return ranks.reduce_dtype or accumulation_dtype(dtype)
