"""Logsumexps of a matrix whose rows lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.distributed.exchange import Segment, partner
from fastcl.distributed.ranks import Ranks
from fastcl.distributed.statistics import Columns, empty_running, gather_sides, merge
from fastcl.distributed.walk import Once, RowGradients, Walk
from fastcl.kernels.dispatch import LineGradients, LineStatistics, Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.tiles import Pairs, Running
from fastcl.kernels.walk import paired_rows


def logsumexp(
    stream: Stream,
    backend: str,
    ranks: Ranks,
    rows: bool,
    cols: bool,
    own_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(row rest, column rest, positives' logits, row top, column top) of this rank's lines.

    As the operator of one process, over the columns (rows) of all ranks. With v = u the columns
    are the rows. `own_ids` drop pairs in this rank's own block, where the batch has no ids.
    """
    walk = Walk.of(stream, backend, ranks, own_ids)
    out: tuple[Tensor, ...] = _LogSumExp.apply(  # type: ignore[no-untyped-call]
        stream.u, stream.v, stream.scale, stream.row_bias, walk, rows, cols
    )
    return out


class _LogSumExp(Once):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor | None,
        scale: Tensor,
        row_bias: Tensor | None,
        walk: Walk,
        rows: bool,
        cols: bool,
    ) -> tuple[Tensor, ...]:
        ctx.device_type, ctx.gradients, ctx.walk = u.device.type, _line_gradients, walk
        ctx.of = rows, cols
        with torch.autocast(u.device.type, enabled=False):
            of_rows, of_cols, pairs = _statistics(walk, u, v, rows, cols)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, v, pairs.s, of_rows.max, of_rows.sum, of_cols.max, of_cols.sum)
        wide = vector_dtype(u)
        tops = of_rows.max.to(wide), of_cols.max.to(wide)
        ctx.mark_non_differentiable(*tops)
        rests = of_rows.sum.to(wide).log(), of_cols.sum.to(wide).log()
        return (*rests, pairs.logits.to(wide), *tops)


def _statistics(
    walk: Walk, u: Tensor, v: Tensor | None, rows: bool, cols: bool
) -> tuple[Running, Running, Pairs]:
    ranks, symmetric = walk.ranks, v is None
    running = empty_running(len(u) if rows else 0, u)
    columns = Columns(ranks, u)
    none = u.new_zeros(len(u), dtype=accumulation_dtype(u.dtype))
    pairs = Pairs(none, none.clone())
    for block, stream in walk.blocks(u, v):
        own = block.symmetric
        if block.empty:
            found = LineStatistics(None, None, None)
        else:
            found = walk.backend.logsumexp(stream, rows, cols and not own)
        if found.rows is not None:
            part = merge([running[block.rows], found.rows])
            running.max[block.rows], running.sum[block.rows] = part.max, part.sum
        if found.pairs is not None:
            count = paired_rows(stream)
            pairs.s[:count], pairs.logits[:count] = (
                found.pairs.s[:count],
                found.pairs.logits[:count],
            )
        if cols and not own:
            columns.add(block, found.cols or empty_running(len(block.keys), u))
    if not cols:
        return running, empty_running(0, u), pairs
    of_cols = columns.merged(_computed(ranks, symmetric))
    if symmetric:
        return merge([running, of_cols]), empty_running(0, u), pairs
    return running, of_cols, pairs


def _computed(ranks: Ranks, symmetric: bool) -> dict[int, Segment]:
    """Which ranks compute statistics of this rank's rows as columns, and of which."""
    rank, size = ranks.rank, ranks.size
    if not symmetric:
        return {s: Segment(rank, slice(0, ranks.counts[rank])) for s in range(size)}
    before = (((rank - d) % size, d) for d in range(1, size // 2 + 1))
    return {s: partner(ranks.counts, s, d)[1] for s, d in before}


def _line_gradients(
    ctx: Any, g_rows: Tensor | None, g_cols: Tensor | None, g_pairs: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    walk: Walk = ctx.walk
    u, v, pair_s, *parts = ctx.saved_tensors
    (rows, cols), symmetric = ctx.of, v is None
    of_rows, of_cols = Running(*parts[:2]), Running(*parts[2:])
    needs = Needs(*ctx.needs_input_grad[:4])
    if symmetric:
        needs = needs._replace(v=needs.u)
    g_rows = torch.zeros_like(pair_s, dtype=vector_dtype(u)) if g_rows is None else g_rows
    g_cols = torch.zeros_like(g_rows) if g_cols is None else g_cols
    # A column's gradient is known to its owner, and wanted by all: the rank that computed a part.
    lines = (of_rows, g_rows) if symmetric else (of_cols, g_cols)
    sides = gather_sides(*lines, walk.ranks) if cols else None
    total = RowGradients(walk.stream, needs)
    store = accumulation_dtype(u.dtype)
    for block, stream in walk.blocks(u, v):
        keys = block.keys.new_zeros(block.keys.shape, dtype=store) if block.empty else None
        if not block.empty:
            col_side, col_grad = (None, None)
            if sides is not None and not block.symmetric:
                of_block = [
                    (sides[c.rank][0][c.rows], sides[c.rank][1][c.rows]) for c in block.cols
                ]
                col_side = Running(
                    torch.cat([x.max for x, _ in of_block]), torch.cat([x.sum for x, _ in of_block])
                )
                col_grad = torch.cat([g for _, g in of_block])
            own = stream.diagonal is not None
            found = walk.backend.logsumexp_backward(
                stream,
                LineStatistics(
                    of_rows[block.rows] if rows else None,
                    col_side,
                    Pairs(pair_s, pair_s) if own else None,
                ),
                LineGradients(
                    g_rows[block.rows].contiguous() if rows else None,
                    col_grad,
                    g_pairs if own else None,
                ),
                needs,
                store=store,
            )
            total.add(block, found)
            keys = found.v
        if needs.v and not block.symmetric:
            assert keys is not None
            walk.exchange.give(block, keys)
    keys = None
    if needs.v and symmetric:  # the keys' gradients from other ranks are this rank's rows'
        walk.exchange.collect(total.u)
    elif needs.v:
        keys = walk.exchange.collect()
    return (*total.finish(keys), None, None, None)
