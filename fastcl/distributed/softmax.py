"""Logsumexps of a matrix whose rows lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.distributed.exchange import Block, Segment, partner
from fastcl.distributed.ranks import Ranks
from fastcl.distributed.statistics import Columns, Sides, empty_running, merge
from fastcl.distributed.walk import Once, RowGradients, Walk, save, saved
from fastcl.kernels.dispatch import Gradients, LineGradients, LineStatistics, Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.tiles import Pairs, Running
from fastcl.kernels.walk import paired_rows


def logsumexp(
    stream: Stream, backend: str, ranks: Ranks, cols: bool, own_ids: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(row rest, column rest, positives' logits, row top, column top) of this rank's lines.

    As the operator of one process, over the columns (rows) of all ranks; columns' only with `cols`.
    With v = u the columns are the rows. `own_ids` drop pairs in this rank's own block, where the
    batch has no ids.
    """
    walk = Walk.of(stream, backend, ranks, own_ids)
    out: tuple[Tensor, ...] = _LogSumExp.apply(  # type: ignore[no-untyped-call]
        stream.u, stream.v, stream.scale, stream.row_bias, walk, cols
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
        cols: bool,
    ) -> tuple[Tensor, ...]:
        ctx.device_type, ctx.gradients, ctx.cols = u.device.type, _line_gradients, cols
        with torch.autocast(u.device.type, enabled=False):
            of_rows, of_cols, pairs = _statistics(walk, u, v, cols)
        ctx.set_materialize_grads(False)
        save(ctx, walk, u, v, pairs.s, of_rows.max, of_rows.sum, of_cols.max, of_cols.sum)
        wide = vector_dtype(u)
        tops = of_rows.max.to(wide), of_cols.max.to(wide)
        ctx.mark_non_differentiable(*tops)
        rests = of_rows.sum.to(wide).log(), of_cols.sum.to(wide).log()
        return (*rests, pairs.logits.to(wide), *tops)


def _statistics(
    walk: Walk, u: Tensor, v: Tensor | None, cols: bool
) -> tuple[Running, Running, Pairs]:
    """Of this rank's rows, of its columns (none where v is u: they are rows), and its positives."""
    rows, columns = empty_running(len(u), u), Columns(walk.ranks, u)
    pairs = Pairs(torch.zeros_like(rows.sum), torch.zeros_like(rows.sum))
    for block, stream in walk.blocks(u, v):
        found = LineStatistics(None, None, None)
        if not block.empty:
            found = walk.backend.logsumexp(stream, True, cols and not block.symmetric)
        if found.rows is not None:
            part = merge([rows[block.rows], found.rows])
            rows.max[block.rows], rows.sum[block.rows] = part.max, part.sum
        if found.pairs is not None:
            here = slice(0, paired_rows(stream))
            pairs.s[here], pairs.logits[here] = found.pairs.s[here], found.pairs.logits[here]
        if cols and not block.symmetric:
            columns.add(block, found.cols or empty_running(len(block.keys), u))
    none = empty_running(0, u)
    if not cols:
        return rows, none, pairs
    of_cols = columns.merged(_computed(walk.ranks, symmetric=v is None))
    return (merge([rows, of_cols]), none, pairs) if v is None else (rows, of_cols, pairs)


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
    needs = Needs(*ctx.needs_input_grad[:4])
    with saved(ctx) as (walk, (u, v, pair_s, *lines)):
        rows, cols = Running(*lines[:2]), Running(*lines[2:])
        zero = torch.zeros_like(pair_s, dtype=vector_dtype(u))
        grads = LineGradients(
            zero if g_rows is None else g_rows.contiguous(),
            (zero if g_cols is None else g_cols) if ctx.cols else None,
            g_pairs,
        )
        return (*_gradients(walk, u, v, pair_s, rows, cols, grads, needs), None, None)


def _gradients(
    walk: Walk,
    u: Tensor,
    v: Tensor | None,
    pair_s: Tensor,
    of_rows: Running,
    of_cols: Running,
    grads: LineGradients,
    needs: Needs,
) -> list[Tensor | None]:
    symmetric = v is None
    if symmetric:
        needs = needs._replace(v=needs.u)
    sides = None
    if grads.rows is not None and grads.cols is not None:
        # A column's gradient is known to its owner, and wanted by all who computed a part of it.
        of_owned = (of_rows, grads.rows) if symmetric else (of_cols, grads.cols)
        sides = Sides(*of_owned, walk.ranks)
    total, store = RowGradients(walk.stream, needs), accumulation_dtype(u.dtype)
    for block, stream in walk.blocks(u, v):
        if block.empty:
            found = Gradients(v=torch.zeros_like(block.keys, dtype=store))
        else:
            side = None if block.symmetric else sides
            statistics, incoming = _of_block(block, stream, of_rows, pair_s, grads, side)
            found = walk.backend.logsumexp_backward(
                stream, statistics, incoming, needs, store=store
            )
            total.add(block, found)
        if found.v is not None and needs.v and not block.symmetric:
            walk.exchange.give(block, found.v)
    keys = None
    if needs.v and symmetric:  # what others found for their keys is added to this rank's rows
        walk.exchange.collect(total.u)
    elif needs.v:
        keys = walk.exchange.collect()
    return total.finish(keys)


def _of_block(
    block: Block,
    stream: Stream,
    rows: Running,
    pair_s: Tensor,
    grads: LineGradients,
    sides: Sides | None,
) -> tuple[LineStatistics, LineGradients]:
    """Statistics and incoming gradients of a block's lines, and of positives if it has them."""
    cols, of_cols = (None, None) if sides is None else sides.of(block)
    pairs, of_pairs = None, None
    if stream.diagonal is not None:
        pairs, of_pairs = Pairs(pair_s, pair_s), grads.pairs
    assert grads.rows is not None
    incoming = LineGradients(grads.rows[block.rows], of_cols, of_pairs)
    return LineStatistics(rows[block.rows], cols, pairs), incoming
