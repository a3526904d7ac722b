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
    if len(parts) == 1:
        return parts[0]
    return merge_rows(torch.stack([x.max for x in parts]), torch.stack([x.sum for x in parts]))


def merge_rows(tops: Tensor, sums: Tensor) -> Running:
    """The same of parts [P, lines]."""
    wide = vector_dtype(sums)
    top = tops.amax(dim=0)
    finite = torch.where(top == -torch.inf, torch.zeros_like(top), top)  # of nothing: no NaN
    # A share may be 0 where a sum is NaN or infinite, which must not be lost: 0 x NaN is NaN.
    total = (torch.exp((tops - finite).to(wide)) * sums.to(wide)).sum(dim=0)
    return Running(top, total.to(sums.dtype))


class Columns:
    """Partial column statistics of a rank's blocks, on their way to the columns' owners.

    O(N) numbers, whatever the batch: two for each column there, and two back for the backward.
    """

    def __init__(self, ranks: Ranks, like: Tensor) -> None:
        self._ranks, self._like = ranks, like
        self._sizes = [0] * ranks.size
        self._parts: dict[int, Tensor] = {}  # by the first rank whose columns they are

    def add(self, block: Block, found: Running) -> None:
        """Takes the column statistics of a block."""
        for segment in block.cols:
            self._sizes[segment.rank] = segment.size
        self._parts[block.cols[0].rank] = torch.stack([found.max, found.sum], dim=1)

    def merged(self, computed: dict[int, Segment]) -> Running:
        """Statistics of this rank's own columns over all ranks that computed a part of them.

        `computed`: by rank, which of this rank's rows those are.
        """
        ranks = self._ranks
        own = ranks.counts[ranks.rank]
        came = [computed[s].size if s in computed else 0 for s in range(ranks.size)]
        parts = [self._parts[s] for s in sorted(self._parts)]
        packed = torch.cat([*parts, self._like.new_empty(0, 2, dtype=self._dtype)])
        arrived = send_to_owners(packed, self._sizes, came, ranks)
        if all(segment.size == own for segment in computed.values()) and computed:
            whole = arrived.view(len(computed), own, 2)
            return merge_rows(whole[..., 0], whole[..., 1])
        rows = [empty_running(own, self._like)]
        for s, part in zip(range(ranks.size), torch.split(arrived, came), strict=True):
            if s in computed:
                rows.append(empty_running(own, self._like))
                here = computed[s].rows
                rows[-1].max[here], rows[-1].sum[here] = part.unbind(1)
        return merge(rows)

    @property
    def _dtype(self) -> torch.dtype:
        return accumulation_dtype(self._like.dtype)


class Sides:
    """Everyone's lines as the backward wants them: their maxima, and gradients over their sums."""

    def __init__(self, running: Running, gradient: Tensor, ranks: Ranks) -> None:
        side = running.side(gradient)
        self._ranks = ranks
        self._lines = gather_rows(torch.stack([side.max, side.weight], dim=1), ranks)

    def of(self, block: Block) -> tuple[Running, Tensor]:
        """Of a block's columns: logsumexps whose sums are 1, for gradients that are divided."""
        lines = self._lines  # a block of all ranks has them in order
        if len(block.cols) < self._ranks.size:
            (segment,) = block.cols
            lines = lines[self._ranks.rows_of(segment.rank)][segment.rows]
        top, weight = (x.contiguous() for x in lines.unbind(1))
        return Running(top, torch.ones_like(top)), weight.to(vector_dtype(weight))
