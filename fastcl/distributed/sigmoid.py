"""Row sums of the sigmoid loss of a matrix whose rows lie on several ranks: nothing is merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.distributed.ranks import Ranks
from fastcl.distributed.walk import Once, RowGradients, Walk, save, saved
from fastcl.kernels.dispatch import Gradients, LineGradients, Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.walk import paired_rows


def sigmoid_rows(stream: Stream, backend: str, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """(row sums of softplus(l_ij) over the negatives of all ranks, the positives' logits)."""
    walk = Walk.of(stream, backend, ranks)
    out: tuple[Tensor, Tensor] = _SigmoidRows.apply(  # type: ignore[no-untyped-call]
        stream.u, stream.v, stream.scale, stream.row_bias, walk
    )
    return out


class _SigmoidRows(Once):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, scale: Tensor, row_bias: Tensor | None, walk: Walk
    ) -> tuple[Tensor, Tensor]:
        ctx.device_type, ctx.gradients = u.device.type, _row_gradients
        rows = u.new_zeros(len(u), dtype=vector_dtype(u))
        pair_s = u.new_zeros(len(u), dtype=accumulation_dtype(u.dtype))
        logits = torch.zeros_like(rows)
        with torch.autocast(u.device.type, enabled=False):
            for block, stream in walk.blocks(u, v):
                if block.empty:
                    continue
                found, pairs = walk.backend.sigmoid_rows(stream)
                rows += found
                if pairs is not None:
                    count = paired_rows(stream)
                    pair_s[:count] = pairs.s[:count]
                    logits[:count] = pairs.logits[:count].to(logits.dtype)
        save(ctx, walk, u, v, pair_s)
        return rows, logits


def _row_gradients(ctx: Any, g_rows: Tensor, g_pairs: Tensor) -> tuple[Any, ...]:
    needs = Needs(*ctx.needs_input_grad[:4])
    incoming = LineGradients(rows=g_rows.contiguous(), pairs=g_pairs)
    with saved(ctx) as (walk, (u, v, pair_s)):
        return (*_gradients(walk, u, v, pair_s, incoming, needs), None)


def _gradients(
    walk: Walk, u: Tensor, v: Tensor, pair_s: Tensor, incoming: LineGradients, needs: Needs
) -> list[Tensor | None]:
    store = accumulation_dtype(u.dtype)
    total = RowGradients(walk.stream, needs)
    for block, stream in walk.blocks(u, v):
        if block.empty:
            found = Gradients(v=torch.zeros_like(block.keys, dtype=store))
        else:
            own = stream.diagonal is not None
            grads = incoming if own else incoming._replace(pairs=None)
            found = walk.backend.sigmoid_rows_backward(stream, pair_s, grads, needs, store=store)
            total.add(block, found)
        if found.v is not None and needs.v:
            walk.exchange.give(block, found.v)
    return total.finish(walk.exchange.collect() if needs.v else None)
