"""What the losses of all families share: the streams of a rank's blocks, and their gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastcl.distributed.collectives import gather_rows
from fastcl.distributed.exchange import Block, Exchange, exchange_of
from fastcl.distributed.ranks import Ranks
from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Gradients, Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype


@dataclass
class Walk:
    """A rank's part of a matrix that is split by rows, block by block.

    `stream` is of this rank's rows of both towers (v is None: self-similarities); `own_ids` are ids
    for its own block alone.
    """

    stream: Stream
    backend: dispatch.Backend
    ranks: Ranks
    exchange: Exchange
    ids: tuple[Tensor, ...] | None  # by rank
    own_ids: Tensor | None

    @staticmethod
    def of(stream: Stream, backend: str, ranks: Ranks, own_ids: Tensor | None = None) -> Walk:
        """The walk for a stream; its ids, which are of the whole batch, are fetched."""
        ids = None
        if stream.row_ids is not None:
            ids = torch.split(gather_rows(stream.row_ids, ranks), list(ranks.counts))
        exchange = exchange_of(ranks, symmetric=stream.v is None)
        return Walk(stream, dispatch.get(backend), ranks, exchange, ids, own_ids)

    def blocks(self, u: Tensor, v: Tensor | None) -> Iterator[tuple[Block, Stream]]:
        """The blocks in order, each as a stream."""
        for block in self.exchange.blocks(u if v is None else v):
            yield block, self._stream(block, u)

    def _stream(self, block: Block, u: Tensor) -> Stream:
        whole, rows = self.stream, block.rows
        row_ids = col_ids = None
        if block.symmetric and self.own_ids is not None:
            row_ids = col_ids = self.own_ids
        elif self.ids is not None:
            row_ids = self.ids[self.ranks.rank][rows]
            parts = [self.ids[segment.rank][segment.rows] for segment in block.cols]
            col_ids = parts[0] if len(parts) == 1 else torch.cat(parts)
        return replace(
            whole,
            u=u[rows],
            v=None if block.symmetric else block.keys,
            scale=_lines(whole.scale, rows),
            row_bias=None if whole.row_bias is None else _lines(whole.row_bias, rows),
            row_ids=row_ids,
            col_ids=col_ids,
            diagonal=whole.diagonal if block.symmetric else block.diagonal,
        )


def _lines(x: Tensor, rows: slice) -> Tensor:
    """One number for all rows, or those of some rows."""
    return x if x.dim() == 0 else x[rows]


class RowGradients:
    """Gradients of what belongs to this rank's rows, summed over its blocks, as accumulated."""

    def __init__(self, stream: Stream, needs: Needs) -> None:
        self._stream, self._needs = stream, needs
        self._u: Tensor | None = None
        # Of each block these are numbers in the accumulation dtype: summed in a wider one.
        self._scale = _zeros(stream.scale, needs.scale)
        self._row_bias = _zeros(stream.row_bias, needs.row_bias)

    def add(self, block: Block, found: Gradients) -> None:
        """Adds a block's."""
        rows = block.rows
        if found.u is not None:
            if self._u is None and len(found.u) == len(self._stream.u):
                self._u = found.u  # of all rows: the first to be added to
            else:
                self.u[rows] += found.u
        for total, part in ((self._scale, found.scale), (self._row_bias, found.row_bias)):
            if total is not None and part is not None:
                lines = _lines(total, rows)
                lines += part

    @property
    def u(self) -> Tensor:
        """Of the embeddings of this rank's rows."""
        if self._u is None:
            u = self._stream.u
            self._u = torch.zeros_like(u, dtype=accumulation_dtype(u.dtype))
        return self._u

    def finish(self, keys: Tensor | None, factor: Tensor | None = None) -> list[Tensor | None]:
        """In the inputs' dtypes: of u, v, scale and the row bias, these three times `factor`.

        `keys`: v's, as accumulated, and by that factor already.
        """
        stream = self._stream
        rows = [self.u if self._needs.u else None, self._scale, self._row_bias]
        if factor is not None:
            rows = [None if x is None else x * factor for x in rows]
        like = (stream.u, stream.u, stream.scale, stream.row_bias)
        made = (rows[0], keys, *rows[1:])
        return [
            None if x is None or given is None else x.to(given.dtype)
            for x, given in zip(made, like, strict=True)
        ]


def _zeros(x: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.zeros_like(x, dtype=vector_dtype(x)) if wanted and x is not None else None


class Once(torch.autograd.Function):
    """A function of ranks: differentiable once, and it says so."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradients by `gradients(ctx, ...)`, out of reach of a second derivative."""
        if torch.is_grad_enabled():
            _refuse()
        with torch.autocast(ctx.device_type, enabled=False):
            return ctx.gradients(ctx, *grads)


def save(ctx: Any, walk: Walk, *tensors: Tensor | None) -> None:
    """Keeps a walk and tensors for the backward; what it holds of other ranks goes with these."""
    ctx.walk, ctx.count = walk, len(tensors)
    ctx.save_for_backward(*tensors, *walk.exchange.kept)
    walk.exchange.kept = ()


@contextlib.contextmanager
def saved(ctx: Any) -> Iterator[tuple[Walk, Sequence[Any]]]:
    """That walk and those tensors, in the backward."""
    tensors, walk = ctx.saved_tensors, ctx.walk
    walk.exchange.kept = tensors[ctx.count :]
    try:
        yield walk, tensors[: ctx.count]
    finally:
        walk.exchange.kept = ()


def _refuse() -> NoReturn:
    raise RuntimeError(
        "fastcl's losses across ranks can be differentiated once; for second derivatives use one "
        'process with backend="reference"'
    )
