"""The moving parts of a walk over tiles: making them, and gathering gradients from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcl.kernels.dispatch import Gradients, Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.plan import Chunk, TilePlan, row_slices
from fastcl.kernels.tiles import ColTerms, Pairs, RowTerms, Sums, Tile


@dataclass
class Total:
    """A sum of matrix products. While it is empty, `sum` is memory as it came, without zeros."""

    sum: Tensor
    empty: bool = True

    def begin(self) -> bool:
        """Whether the product at hand is to overwrite `sum`; the ones after it are added."""
        empty, self.empty = self.empty, False
        return empty

    def finish(self) -> Tensor:
        """The sum, of no products too."""
        return self.sum.zero_() if self.begin() else self.sum


class Products(Protocol):
    """The matrix products of a walk, with accumulation in the accumulation dtype.

    ``rows`` and ``cols`` prepare a chunk of embeddings; what they return goes into the other two,
    and stays valid until the same method is called again. ``narrow``: G is in the inputs' dtype.
    """

    narrow: bool

    def parts(self, plan: TilePlan) -> int:
        """In how many matrices G enters the products: more than one where 16 bits are too few."""

    def storage(self, dim: int) -> tuple[int, int]:
        """Bytes held for each element of a tile, and for each of its rows and columns."""

    def rows(self, chunk: Tensor) -> Any:
        """A chunk of u [R, D], as the products want it."""

    def cols(self, chunk: Tensor) -> Any:
        """A chunk of the keys [C, D], as the products want it."""

    def similarity(self, a: Any, b: Any, out: Tensor) -> None:
        """out = a b^T for rows a and cols b."""

    def gradients(self, g: Tensor, a: Any, b: Any, da: Total | None, db: Total | None) -> None:
        """da += g b and db += g^T a, each where it is wanted."""


class TorchProducts:
    """Products by PyTorch's matrix multiplication, in float32 (float64 for float64)."""

    narrow = False

    def parts(self, plan: TilePlan) -> int:
        """G is as wide as the sums it goes into."""
        return 1

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def storage(self, dim: int) -> tuple[int, int]:
        """A tile; and for 16-bit inputs the widened chunks, and the rows' float32 gradient."""
        wide = accumulation_dtype(self._dtype)
        return wide.itemsize, 0 if self._dtype == wide else 2 * dim * wide.itemsize

    def _widened(self, chunk: Tensor, name: str) -> Tensor:
        """The chunk in the accumulation dtype, contiguous: itself where it is both already."""
        dtype = accumulation_dtype(chunk.dtype)
        if chunk.dtype == dtype and chunk.is_contiguous():
            return chunk
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(chunk):
            buffer = self._buffers[name] = chunk.new_empty(chunk.shape, dtype=dtype)
        return buffer[: len(chunk)].copy_(chunk)

    def rows(self, chunk: Tensor) -> Tensor:
        """A chunk of u."""
        return self._widened(chunk, "rows")

    def cols(self, chunk: Tensor) -> Tensor:
        """A chunk of the keys."""
        return self._widened(chunk, "cols")

    def similarity(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a b^T."""
        torch.mm(a, b.T, out=out)

    def gradients(
        self, g: Tensor, a: Tensor, b: Tensor, da: Total | None, db: Total | None
    ) -> None:
        """da += g b and db += g^T a, each where it is wanted."""
        if da is not None:
            add_product(da, g, b)
        if db is not None:
            add_product(db, g.T, a)


def add_product(total: Total, x: Tensor, y: Tensor, **options: Any) -> None:
    """total += x y; with beta 0 PyTorch reads nothing of what it overwrites."""
    torch.addmm(total.sum, x, y, beta=0 if total.begin() else 1, out=total.sum, **options)


def _codes(row_ids: Tensor, col_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ids as small integers as wide as a logit: equal where the ids are equal."""
    _, codes = torch.unique(torch.cat([row_ids, col_ids]), return_inverse=True)
    codes = codes.to(torch.int64 if dtype == torch.float64 else torch.int32)
    return codes[: len(row_ids)].contiguous(), codes[len(row_ids) :].contiguous()


class TileMaker:
    """Makes the tiles of a stream, in storage that every walk step reuses."""

    def __init__(self, stream: Stream, plan: TilePlan, products: Products) -> None:
        self.stream, self.plan, self.products = stream, plan, products
        self.unit: Tensor | None = None  # by which gradient tiles are multiplied; see Accumulator
        self.dtype = accumulation_dtype(stream.u.dtype)
        self._views: dict[tuple[int, int, int], Tensor] = {}
        self.allocate()

    def allocate(self) -> None:
        """Storage for the similarities of a tile, and the lines' terms of the logits."""
        stream = self.stream
        self.storage = stream.u.new_empty(self.plan.workspace, dtype=self.dtype)
        row_ids, col_ids = stream.row_ids, stream.col_ids
        if row_ids is not None and col_ids is not None:
            row_ids, col_ids = _codes(row_ids, col_ids, self.dtype)
        self.row_terms = RowTerms(stream.scale, stream.row_bias, row_ids)
        self.col_terms = ColTerms(stream.col_bias, col_ids)

    def rows(self) -> Iterator[tuple[Chunk, Any]]:
        """The chunks of u, each with its operand."""
        for chunk in self.plan.row_chunks():
            yield chunk, self.products.rows(self.stream.u[chunk.slice])

    def cols(self, start: int = 0) -> Iterator[tuple[Chunk, Any]]:
        """The chunks of the keys from `start` on, each with its operand."""
        for chunk in self.plan.col_chunks():
            if chunk.start >= start:
                yield chunk, self.products.cols(self.stream.keys[chunk.slice])

    def tile(
        self,
        rows: Chunk,
        cols: Chunk,
        a: Any,
        b: Any,
        *,
        pairs: Pairs | None = None,
        made: bool = False,
    ) -> Tile:
        """The tile of these chunks; `made`: it is still in the storage of a keeping plan."""
        s = self._view(rows.size * cols.start if self.plan.keep else 0, rows.size, cols.size)
        if not made:
            self.products.similarity(a, b, s)
        return Tile(s=s, **self.described(rows, cols, pairs))

    def _view(self, start: int, rows: int, cols: int) -> Tensor:
        """A part of the storage as a matrix; tiles of one size share it."""
        key = start, rows, cols
        if key not in self._views:
            self._views[key] = self.storage[start : start + rows * cols].view(rows, cols)
        return self._views[key]

    def described(self, rows: Chunk, cols: Chunk, pairs: Pairs | None) -> dict[str, Any]:
        """What a tile of these chunks says of its logits, all but the similarities."""
        diagonal = self.stream.diagonal
        return {
            "rows": self.row_terms[rows.slice],
            "cols": self.col_terms[cols.slice],
            "diagonal": None if diagonal is None else diagonal + rows.start - cols.start,
            "pairs": None if pairs is None else pairs[rows.slice],
        }


def new_pairs(stream: Stream) -> Pairs | None:
    """Room for what the dropped diagonal holds, one per row of u; None without a diagonal."""
    if stream.diagonal is None:
        return None
    empty = stream.u.new_zeros(len(stream.u), dtype=accumulation_dtype(stream.u.dtype))
    return Pairs(empty, torch.zeros_like(empty))


def paired_rows(stream: Stream) -> int:
    """How many rows have a partner on the dropped diagonal (as torch.diagonal counts)."""
    if stream.diagonal is None:
        return 0
    return max(0, min(stream.u.shape[0], stream.keys.shape[0] - stream.diagonal))


class Accumulator:
    """Collects the gradients of a walk: rows of u chunk by chunk, v in one full accumulator.

    For 16-bit inputs only v's accumulator is a full float32 copy. With `store`, gradients are
    returned in that dtype instead of the inputs' own.
    """

    def __init__(self, maker: TileMaker, needs: Needs, *, store: torch.dtype | None = None) -> None:
        self.stream, self.products, self.needs = maker.stream, maker.products, needs
        u, keys = self.stream.u, self.stream.keys
        self.unit: Tensor | None = None
        self.dtype = accumulation_dtype(u.dtype)
        self.store = store or u.dtype
        self.du = self.dv = None
        if self.stream.v is None:  # one tower: all that it is given is summed as the keys' is
            if needs.u:
                self.dv = u.new_empty(u.shape, dtype=self.dtype)
        else:
            if needs.u:
                self.du = u.new_empty(u.shape, dtype=self.store)
            if needs.v:
                self.dv = keys.new_empty(keys.shape, dtype=self.dtype)
        self._chunks_of_dv: dict[int, Total] = {}
        if self.dv is not None:
            chunks = maker.plan.col_chunks()
            self._chunks_of_dv = {c.start: Total(self.dv[c.slice]) for c in chunks}
        self.sums = Sums(
            row_gs=u.new_zeros(len(u), dtype=self.dtype) if needs.scale else None,
            row_g=u.new_zeros(len(u), dtype=self.dtype) if needs.row_bias else None,
            col_g=u.new_zeros(len(keys), dtype=self.dtype) if needs.col_bias else None,
        )

    def expect(self, *weights: Tensor | None, scaled: bool = True) -> Tensor | None:
        """By which power of 2 tiles of G are to be made larger, so that float16 holds them.

        G is at most the weights of its lines times the scale. For 65,536 pairs that is 1e-5 for the
        largest of its entries, and float16 ends at 6e-8. The accumulators are divided at the end.
        """
        if not self.products.narrow or self.stream.u.dtype != torch.float16:
            return None
        bounds = [x.detach().abs().max() for x in weights if x is not None]
        bound = torch.stack(bounds).sum().float() * (self.stream.scale.abs().max() if scaled else 1)
        self.unit = torch.exp2((14 - bound.log2().ceil()).clamp(-60.0, 60.0))
        return self.unit

    def row_chunk(self, rows: Chunk) -> Total | None:
        """An empty accumulator for these rows of u's gradient, or None if it is not wanted."""
        if self.du is None:
            return None
        if self.du.dtype == self.dtype:
            return Total(self.du[rows.slice])
        return Total(self.du.new_empty((rows.size, self.du.shape[1]), dtype=self.dtype))

    def col_chunk(self, cols: Chunk) -> Total | None:
        """The accumulator for these rows of v's gradient, or None if it is not wanted."""
        return None if self.dv is None else self._chunks_of_dv[cols.start]

    def add(self, tile: Tile, cols: Chunk, a: Any, b: Any, du_chunk: Total | None) -> None:
        """Adds what one gradient tile gives to both towers."""
        self.products.gradients(tile.gradient, a, b, du_chunk, self.col_chunk(cols))

    def finish_rows(self, rows: Chunk, du_total: Total | None, grad_pairs: Tensor | None) -> None:
        """Stores these rows of u's gradient where they are to be rounded, with the pairs' term.

        `grad_pairs` is the gradient with respect to the pairs' logits, so far as it is known.
        """
        stream = self.stream
        if self.du is None or du_total is None:
            return
        du_chunk = du_total.finish()
        if self.du.dtype == self.dtype:
            return  # they lie where they belong; finish() does the rest for all rows at once
        if self.unit is not None:
            du_chunk /= self.unit
        if grad_pairs is not None and stream.diagonal is not None:
            stop = min(rows.stop, paired_rows(stream))
            partners = stream.keys[stream.diagonal :]
            self._add_pairs(du_chunk, grad_pairs, partners, rows.start, stop)
        self.du[rows.slice] = du_chunk

    def finish(self, grad_pairs: Tensor | None = None, pair_s: Tensor | None = None) -> Gradients:
        """All gradients, in the dtypes and shapes of their inputs, the pairs' terms included."""
        stream, needs, sums = self.stream, self.needs, self.sums
        symmetric, count = stream.v is None, paired_rows(stream)
        for total in self._chunks_of_dv.values():
            total.finish()
        du = self.du if self.du is not None and self.du.dtype == self.dtype else None
        if self.unit is not None:
            for gradient in (du, self.dv):
                if gradient is not None:
                    gradient /= self.unit
        if grad_pairs is not None and stream.diagonal is not None:
            if du is not None:
                self._add_pairs(du, grad_pairs, stream.keys[stream.diagonal :], 0, count)
            if self.dv is not None:
                self._add_pairs(self.dv[stream.diagonal :], grad_pairs, stream.u, 0, count)
            if self.dv is not None and symmetric:
                self._add_pairs(self.dv, grad_pairs, stream.u[stream.diagonal :], 0, count)
            if sums.row_g is not None:
                sums.row_g[:count] += grad_pairs[:count]
            if sums.col_g is not None:
                sums.col_g[stream.diagonal :][:count] += grad_pairs[:count]
        grad_scale = None
        if sums.row_gs is not None:
            grad_scale = sums.row_gs.to(vector_dtype(sums.row_gs))
            if grad_pairs is not None and pair_s is not None:
                grad_scale[:count] += grad_pairs[:count] * pair_s[:count]
            grad_scale = _like(grad_scale, stream.scale)
        row_bias = sums.row_g
        if row_bias is not None and stream.row_bias is not None:
            row_bias = _like(row_bias, stream.row_bias)
        dv = None if self.dv is None else self.dv.to(self.store)
        return Gradients(
            dv if symmetric else self.du,
            None if symmetric else dv,
            grad_scale,
            row_bias if needs.row_bias else None,
            sums.col_g,
        )

    def _add_pairs(
        self, target: Tensor, grad_pairs: Tensor, partners: Tensor, start: int, stop: int
    ) -> None:
        """target_(i - start) += scale_i grad_pairs_i partners_i for i in [start, stop)."""
        if stop <= start:
            return  # rows past the last that has a partner
        scale = RowTerms(self.stream.scale)[start:stop].scale
        factor = (grad_pairs[start:stop] * scale).to(self.dtype)
        for part in row_slices(stop - start, target.shape[1]):
            here = slice(part.start + start, part.stop + start)
            target[part].addcmul_(factor[part, None], partners[here].to(self.dtype))


def _like(per_row: Tensor, given: Tensor) -> Tensor:
    """A per-row gradient in the dtype and shape of its input: summed where that is one number."""
    if given.numel() == 1:
        per_row = per_row.sum().reshape(given.shape)
    return per_row.to(given.dtype)
