"""Rows and sums between ranks, uneven numbers of rows included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.ranks import Ranks
from fastcl.kernels.dtypes import accumulation_dtype


def _named(new: str, old: str) -> Any:
    """A collective by its name of PyTorch 2.13, or the one it had until then."""
    return getattr(dist, new, None) or getattr(dist, old)


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes: what is only carried needs no dtype that the carrier knows."""
    x = x.contiguous()
    return (x if x.dim() else x[None]).view(torch.uint8)


def gather_rows(x: Tensor, ranks: Ranks) -> Tensor:
    """Everyone's rows [n_r, ...], rank by rank: [N, ...]. No gradient."""
    out, x = x.new_empty(ranks.total, *x.shape[1:]), x.contiguous()
    group = ranks.team.group
    with ranks.team.watched("gathering rows"):
        if min(ranks.counts) == max(ranks.counts):
            gather = _named("all_gather_single", "all_gather_into_tensor")
            works = [gather(_bytes(out), _bytes(x), group=group, async_op=True)]
        else:  # each rank's straight to where they belong: nothing is padded
            parts = [out[ranks.rows_of(s)] for s in range(ranks.size)]
            parts[ranks.rank].copy_(x)
            others = [s for s in range(ranks.size) if s != ranks.rank]
            works = _transfer([(x, s) for s in others], [(parts[s], s) for s in others], ranks)
        for work in works:
            ranks.team.wait(work, out)
    return out


def _transfer(
    sent: list[tuple[Tensor, int]], rooms: list[tuple[Tensor, int]], ranks: Ranks
) -> list[dist.Work]:
    """Starts sending to ranks, and filling rooms from ranks; nothing empty is sent."""
    group = ranks.team.group
    operations = [
        dist.P2POp(how, _bytes(x), group=group, group_peer=peer)
        for how, some in ((dist.isend, sent), (dist.irecv, rooms))
        for x, peer in some
        if x.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def send_to_owners(x: Tensor, sent: list[int], came: list[int], ranks: Ranks) -> Tensor:
    """Consecutive rows of x, sent[s] of them to rank s; what came, came[s] rows from rank s on."""
    out = x.new_empty(sum(came), *x.shape[1:])
    with ranks.team.watched("exchanging rows"):
        work = dist.all_to_all_single(
            _bytes(out), _bytes(x), came, sent, group=ranks.team.group, async_op=True
        )
        ranks.team.wait(work, out)
    return out


def sum_to_owners(x: Tensor, ranks: Ranks, factor: Tensor | None = None) -> Tensor:
    """Reduce-scatter of rows [N, ...], times `factor`: the sum over ranks of this rank's rows.

    Sums are in the dtype of x, in the order of the ranks, however it is sent (`reduce_dtype`): each
    number is then rounded once. On a GPU, sums of even batches as they are sent are NCCL's own.
    """
    counts, dtype = list(ranks.counts), ranks.reduce_dtype or x.dtype
    even, group = min(counts) == max(counts), ranks.team.group
    if dtype == x.dtype and even and not x.is_cpu:
        out = x.new_empty(counts[0], *x.shape[1:])
        scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
        with ranks.team.watched("summing rows"):
            wire = _as_sent(x, dtype, factor)
            ranks.team.wait(scatter(out, wire, group=group, async_op=True), out)
        return out
    own = counts[ranks.rank]
    came = send_to_owners(_as_sent(x, dtype, factor), counts, [own] * ranks.size, ranks)
    out = came[:own].to(x.dtype, copy=True)
    for s in range(1, ranks.size):
        out += came[s * own : (s + 1) * own]
    return out


def _as_sent(x: Tensor, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    if factor is None:
        return x.to(dtype).contiguous()
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype)).contiguous()


@dataclass
class Transfer:
    """What is on its way from one rank, while something else is on its way to another."""

    ranks: Ranks
    works: list[dist.Work]
    held: tuple[Tensor, ...]  # memory that is being read or written
    came: Tensor

    def wait(self) -> Tensor:
        """What came, once it is there and what was sent is gone."""
        with self.ranks.team.watched("passing on a block"):
            for work in self.works:
                self.ranks.team.wait(work, self.came)
        self.works, self.held = [], ()
        return self.came


def pass_on(x: Tensor, to: int, room: Tensor, origin: int, ranks: Ranks) -> Transfer:
    """Starts sending x to one rank and filling `room` from another."""
    x = x.contiguous()
    with ranks.team.watched("passing on a block"):
        works = _transfer([(x, to)], [(room, origin)], ranks)
    return Transfer(ranks, works, (x, room), room)


def wire_dtype(dtype: torch.dtype, ranks: Ranks) -> torch.dtype:
    """In which dtype gradients of embeddings of `dtype` are sent."""
    return ranks.reduce_dtype or accumulation_dtype(dtype)
