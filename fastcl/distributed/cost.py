"""What an exchange sends and holds: formulas, which tests hold against counts of real processes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastcl.distributed.exchange import partner
from fastcl.distributed.meeting import HEADER
from fastcl.kernels.dtypes import accumulation_dtype


class ExchangeCost(NamedTuple):
    """Bytes of one forward and backward with gradients for both towers, equal batches, no ids."""

    embeddings: int = 0
    """Sent: rows of the other tower."""
    gradients: int = 0
    """Sent: their gradients."""
    statistics: int = 0
    """Sent: of columns."""
    header: int = 0
    """Sent: in the agreement."""
    held: int = 0
    """Of other ranks' rows, at a time."""

    @property
    def sent(self) -> int:
        """All that is sent."""
        return self.embeddings + self.gradients + self.statistics + self.header


def exchange_cost(
    rows: int,
    ranks: int,
    dim: int,
    dtype: torch.dtype,
    *,
    mode: str,
    symmetric: bool,
    columns: bool,
    reduce_dtype: torch.dtype | None = None,
    rank: int = 0,
) -> ExchangeCost:
    """Of one rank, for `rows` embeddings on each.

    `symmetric`: of self-similarities, half of which each rank computes. `columns`: statistics of
    columns are merged (CLIP's; the symmetric matrix's rows).
    """
    wide, others = accumulation_dtype(dtype), ranks - 1
    counts = (rows,) * ranks
    if symmetric:
        hops = range(1, ranks // 2 + 1)
        asked = [partner(counts, (rank - d) % ranks, d)[1].size for d in hops]
        wanted = [partner(counts, rank, d)[1].size for d in hops]
    else:
        asked = wanted = [rows] * others
    there, back = sum(asked), sum(wanted)
    if mode == "ring":  # whole blocks, which come again in the backward
        there, back = 2 * len(asked) * rows, len(wanted) * rows
    line = 2 * wide.itemsize  # a maximum and a sum; then, from the owner to all, with its weight
    statistics = line * (sum(wanted) + others * rows) if columns else 0
    held = min(2, len(asked)) * rows if mode == "ring" else sum(wanted) + rows * (not symmetric)
    return ExchangeCost(
        there * dim * dtype.itemsize,
        back * dim * (reduce_dtype or wide).itemsize,
        statistics,
        HEADER * others,
        held * dim * dtype.itemsize,
    )
