"""Sums whose gradient is made in the forward, of a matrix whose rows lie on several ranks.

In gather mode only: a ring would hold every block's gradient until the incoming one is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.distributed.collectives import sum_to_owners
from fastcl.distributed.ranks import Ranks
from fastcl.distributed.walk import Once, RowGradients, Walk
from fastcl.kernels.dispatch import Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype


def weighted_logsumexp(stream: Stream, backend: str, ranks: Ranks) -> Tensor:
    """Sum over this rank's rows of log(1 + sum_j e^(l_ij - l_ii)), j over all ranks' columns."""
    return _apply(stream, backend, ranks, sigmoid=False)


def sigmoid_sum(stream: Stream, backend: str, ranks: Ranks) -> Tensor:
    """Sum over this rank's rows of the sigmoid loss with the columns of all ranks."""
    return _apply(stream, backend, ranks, sigmoid=True)


def _apply(stream: Stream, backend: str, ranks: Ranks, sigmoid: bool) -> Tensor:
    walk = Walk.of(stream, backend, ranks)
    grad = torch.is_grad_enabled()
    tensors = (stream.u, stream.v, stream.scale, stream.row_bias)
    needs = [grad and x is not None and x.requires_grad for x in tensors]
    total: Tensor = _Sum.apply(*tensors, walk, sigmoid, Needs(*needs))  # type: ignore[no-untyped-call]
    return total


class _Sum(Once):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        scale: Tensor,
        row_bias: Tensor | None,
        walk: Walk,
        sigmoid: bool,
        needs: Needs,
    ) -> Tensor:
        ctx.device_type, ctx.gradients, ctx.ranks = u.device.type, _sum_gradients, walk.ranks
        with torch.autocast(u.device.type, enabled=False):
            total = u.new_zeros((), dtype=accumulation_dtype(u.dtype))
            ctx.rows = RowGradients(walk.stream, needs)
            for block, stream in walk.blocks(u, v):  # one: all columns
                if block.empty:
                    keys = torch.zeros_like(block.keys, dtype=total.dtype) if needs.v else None
                else:
                    if sigmoid:
                        value, found = walk.backend.sigmoid_sum(stream, 1, needs)
                    else:
                        ones = torch.ones(len(u), dtype=vector_dtype(u), device=u.device)
                        value, found = walk.backend.weighted_logsumexp(stream, ones, False, needs)
                    total, keys = value.sum().to(total.dtype), found.v
                    ctx.rows.add(block, found)
        ctx.save_for_backward(keys)
        return total


def _sum_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (keys,) = ctx.saved_tensors
    if keys is not None:
        keys = sum_to_owners(keys, ctx.ranks, grad)
    return (*ctx.rows.finish(keys, grad), None, None, None)
