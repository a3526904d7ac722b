"""What an exchange sends and holds: formulas, which tests hold against counts of real processes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastcl.distributed.exchange import partner
from fastcl.distributed.meeting import HEADER
from fastcl.kernels.dtypes import accumulation_dtype


class ExchangeCost(NamedTuple):
    """Of rank 0, one forward and backward with gradients for both towers, equal batches, no ids."""

    sent: int
    """Bytes that it sends."""
    held: int
    """Bytes of other ranks' rows that it holds at a time."""


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
) -> ExchangeCost:
    """For `rows` embeddings on each rank.

    `symmetric`: of self-similarities, half of which each rank computes. `columns`: statistics of
    columns are merged (CLIP's; the symmetric matrix's rows).
    """
    wide, others = accumulation_dtype(dtype), ranks - 1
    counts = (rows,) * ranks
    if symmetric:
        hops = range(1, ranks // 2 + 1)
        asked = [partner(counts, -d % ranks, d)[1].size for d in hops]
        wanted = [partner(counts, 0, d)[1].size for d in hops]
    else:
        asked = wanted = [rows] * others
    there, back = sum(asked), sum(wanted)
    if mode == "ring":  # whole blocks, which come again in the backward
        there, back = 2 * len(asked) * rows, len(wanted) * rows
    line = 2 * wide.itemsize  # a maximum and a sum; then, from the owner to all, with its weight
    statistics = line * (sum(wanted) + others * rows) if columns else 0
    sent = there * dim * dtype.itemsize + back * dim * (reduce_dtype or wide).itemsize
    held = min(2, len(asked)) * rows if mode == "ring" else sum(wanted) + rows * (not symmetric)
    return ExchangeCost(sent + statistics + HEADER * others, held * dim * dtype.itemsize)
