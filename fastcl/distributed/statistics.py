"""Running logsumexps of parts, merged: of blocks on one rank, and of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.distributed.collectives import gather_rows, send_to_owners
from fastcl.distributed.exchange import Block, Segment
from fastcl.distributed.ranks import Ranks
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.tiles import Running


def empty_running(rows: int, like: Tensor) -> Running:
    """The logsumexp of nothing, for so many lines of embeddings like these."""
    dtype = accumulation_dtype(like.dtype)
    return Running(
        like.new_full((rows,), -torch.inf, dtype=dtype), like.new_zeros(rows, dtype=dtype)
    )


def merge(parts: list[Running]) -> Running:
    """One logsumexp of several of the same lines, in a fixed order, summed in float64."""
    first = parts[0]
    if len(parts) == 1:
        return first
    wide = vector_dtype(first.sum)
    tops = torch.stack([part.max for part in parts])
    top = tops.amax(dim=0)
    finite = torch.where(top == -torch.inf, torch.zeros_like(top), top)  # of nothing: no NaN
    shares = torch.exp((tops - finite).to(wide))
    sums = torch.stack([part.sum for part in parts]).to(wide)
    # A share may be 0 where a sum is NaN or infinite, which must not be lost: 0 x NaN is NaN.
    return Running(top, (shares * sums).sum(dim=0).to(first.sum.dtype))


class Columns:
    """Partial column statistics of a rank's blocks, on their way to the columns' owners.

    O(N) numbers, whatever the batch: two for each column there, and two back for the backward.
    """

    def __init__(self, ranks: Ranks, like: Tensor) -> None:
        self._ranks, self._like = ranks, like
        self._parts: dict[int, tuple[Segment, Running]] = {}

    def add(self, block: Block, found: Running) -> None:
        """Takes the column statistics of a block."""
        start = 0
        for segment in block.cols:
            self._parts[segment.rank] = segment, found[slice(start, start + segment.size)]
            start += segment.size

    def merged(self, computed: dict[int, Segment]) -> Running:
        """Statistics of this rank's own columns over all ranks that computed a part of them.

        `computed`: by rank, which of this rank's rows those are.
        """
        ranks = self._ranks
        packed, sent, came = [], [], []
        for s in range(ranks.size):
            segment, part = self._parts.get(s, (None, empty_running(0, self._like)))
            packed.append(torch.stack([part.max, part.sum], dim=1))
            sent.append(0 if segment is None else segment.size)
            came.append(computed[s].size if s in computed else 0)
        parts = [empty_running(ranks.counts[ranks.rank], self._like)]
        arrived = send_to_owners(torch.cat(packed), sent, came, ranks)
        for s, segment in computed.items():
            whole = empty_running(ranks.counts[ranks.rank], self._like)
            whole.max[segment.rows], whole.sum[segment.rows] = arrived[s].unbind(1)
            parts.append(whole)
        return merge(parts)


class Sides:
    """Everyone's lines as the backward wants them: their maxima, and gradients over their sums."""

    def __init__(self, running: Running, gradient: Tensor, ranks: Ranks) -> None:
        side = running.side(gradient)
        self._ranks = ranks
        self._lines = gather_rows(torch.stack([side.max, side.weight], dim=1), ranks)

    def of(self, block: Block) -> tuple[Running, Tensor]:
        """Of a block's columns: logsumexps whose sums are 1, for gradients that are divided."""
        parts = [self._lines[self._ranks.rows_of(c.rank)][c.rows] for c in block.cols]
        top, weight = (parts[0] if len(parts) == 1 else torch.cat(parts)).unbind(1)
        top = top.contiguous()
        return Running(top, torch.ones_like(top)), weight.to(vector_dtype(weight))
