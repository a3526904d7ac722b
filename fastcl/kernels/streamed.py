"""The streamed primitives as walks over tiles, for any set of tile kernels.

Costs are in units of one N x M x D matrix product, 2NMD; see docs/architecture.md for the floors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastcl.kernels.dispatch import Gradients, LineGradients, LineStatistics, Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.normalize import normalize, normalize_backward
from fastcl.kernels.plan import Chunk, TilePlan, plan_symmetric, plan_tiles
from fastcl.kernels.tiles import Pairs, Running, Side, Sums, TileKernels
from fastcl.kernels.walk import (
    Accumulator,
    Products,
    TileMaker,
    TorchProducts,
    Total,
    new_pairs,
    paired_rows,
)

_KEPT_TILE = (512, 2048)  # rows of a keeping plan: enough for the products, little to store


class StreamedPrimitives:
    """All primitives over one set of tile kernels and matrix products."""

    default_workspace = 256 << 20
    made_for: tuple[str, ...] = ()

    def __init__(self, kernels: TileKernels) -> None:
        self.kernels = kernels

    def products(self, stream: Stream) -> Products:
        """The matrix products for a stream's dtype."""
        return TorchProducts(stream.u.dtype)

    def plan(self, stream: Stream, *, keep: bool = False) -> TilePlan:
        """How the stream is cut; `keep`: rows of tiles that stay are welcome."""
        n, m = stream.u.shape[0], stream.keys.shape[0]
        itemsize, line = self.products(stream).storage(stream.u.shape[1])
        if stream.v is None:
            return plan_symmetric(n, itemsize, stream.workspace, line_bytes=line)
        plan = plan_tiles(
            n, m, itemsize, stream.workspace, keep=keep, tile=_KEPT_TILE, line_bytes=line
        )
        if plan.keep:
            return plan
        return plan_tiles(n, m, itemsize, stream.workspace, line_bytes=line)

    def _maker(self, stream: Stream, *, keep: bool = False) -> TileMaker:
        return TileMaker(stream, self.plan(stream, keep=keep), self.products(stream))

    # ---- logsumexp: 1 product forward, 3 backward (half of each where v is u) ----

    def logsumexp(self, stream: Stream, rows: bool, cols: bool) -> LineStatistics:
        """Running logsumexps of rows and columns, and the pairs on the dropped diagonal."""
        maker, pairs = self._maker(stream), new_pairs(stream)
        of_rows = _running(stream.u) if rows else None
        of_cols = _running(stream.keys) if cols else None
        for r, a in maker.rows():
            for c, b in maker.cols(start=r.start if stream.v is None else 0):
                tile = maker.tile(r, c, a, b, pairs=pairs)
                row_part = None if of_rows is None else of_rows[r.slice]
                col_part = None if of_cols is None else of_cols[c.slice]
                if stream.v is None and of_rows is not None:
                    # Above the diagonal a tile's columns are rows of its mirror image.
                    col_part = of_rows[c.slice] if c.start > r.start else None
                self.kernels.softmax_statistics(tile, row_part, col_part)
        return LineStatistics(of_rows, of_cols, pairs)

    def logsumexp_backward(
        self,
        stream: Stream,
        statistics: LineStatistics,
        grads: LineGradients,
        needs: Needs,
        store: torch.dtype | None = None,
    ) -> Gradients:
        """Gradients, given those of the row and column logsumexps and of the pairs' logits."""
        maker = self._maker(stream)
        out = Accumulator(maker, needs, store=store)
        rows = _side(statistics.rows, grads.rows)
        cols = _side(statistics.cols, grads.cols)
        pair_s = None if statistics.pairs is None else statistics.pairs.s
        if rows is None and cols is None:
            _pairs_only(maker, out, grads.pairs)
        elif stream.v is None:
            maker.unit = out.expect(grads.rows, grads.rows)
            self._symmetric_backward(maker, out, rows)
        else:
            maker.unit = out.expect(grads.rows, grads.cols)
            for r, a in maker.rows():
                du = out.row_chunk(r)
                for c, b in maker.cols():
                    tile = maker.tile(r, c, a, b)
                    row_part = None if rows is None else rows[r.slice]
                    col_part = None if cols is None else cols[c.slice]
                    sums = out.sums.at(r.slice, c.slice)
                    self.kernels.softmax_gradient(tile, row_part, col_part, sums)
                    out.add(tile, c, a, b, du)
                out.finish_rows(r, du, grads.pairs)
        return out.finish(grads.pairs, pair_s)

    def _symmetric_backward(self, maker: TileMaker, out: Accumulator, side: Side | None) -> None:
        """dU = (G + G^T) U from half of the tiles; H = G + G^T is symmetric too."""
        assert side is not None
        row_gs = out.sums.row_gs
        within = None if row_gs is None else torch.zeros_like(row_gs)
        for r, a in maker.rows():
            for c, b in maker.cols(start=r.start):
                tile = maker.tile(r, c, a, b)
                # A tile on the diagonal holds both (i, j) and (j, i): H counts its pairs twice.
                gs = within if c.start == r.start else row_gs
                sums = Sums(row_gs=None if gs is None else gs[r.slice])
                self.kernels.softmax_gradient(tile, side[r.slice], side[c.slice], sums)
                mirrored = out.col_chunk(c) if c.start > r.start else None
                out.products.gradients(tile.gradient, a, b, out.col_chunk(r), mirrored)
        if row_gs is not None and within is not None:
            row_gs += within / 2

    # ---- weighted sum of row logsumexps, gradient made in the forward: 3 products (4 where rows
    #      of tiles do not fit; 2 where only the query needs a gradient) ----

    def weighted_logsumexp(
        self, stream: Stream, weights: Tensor, add_zero: bool, needs: Needs
    ) -> tuple[Tensor, Gradients]:
        """(the row values y_i, gradients of sum_i weights_i y_i)."""
        maker = self._maker(stream, keep=any(needs))
        out = Accumulator(maker, needs, store=accumulation_dtype(stream.u.dtype))
        rows = _Rows(stream, weights, add_zero)
        if add_zero:  # the bias comes in with the zero, at the end of a row: it rounds no logit
            maker.row_terms = replace(maker.row_terms, bias=None)
        twice = maker.plan.keep or needs.v or needs.col_bias
        if any(needs):
            maker.unit = out.expect(weights if twice else torch.ones_like(weights), scaled=twice)
        for r, a in maker.rows():
            if not any(needs):
                self._statistics_of_rows(maker, rows, r, a)
                rows.finish(r.slice)
            elif twice:
                self._rows_twice(maker, out, rows, r, a)
            else:
                self._rows_online(maker, out, rows, r, a)
        if rows.pairs is not None:
            return rows.values, out.finish(-rows.grad_logits, rows.pairs.s)
        if out.sums.row_g is not None:
            out.sums.row_g.copy_(rows.grad_logits)
        return rows.values, out.finish()

    def _statistics_of_rows(self, maker: TileMaker, rows: _Rows, r: Chunk, a: Any) -> None:
        for c, b in maker.cols():
            tile = maker.tile(r, c, a, b, pairs=rows.pairs)
            self.kernels.softmax_statistics(tile, rows.running[r.slice], None)

    def _rows_twice(
        self, maker: TileMaker, out: Accumulator, rows: _Rows, r: Chunk, a: Any
    ) -> None:
        """Statistics of a row of tiles, then its gradient, from kept tiles or from new ones."""
        self._statistics_of_rows(maker, rows, r, a)
        side, du = rows.finish(r.slice), out.row_chunk(r)
        sums = replace(out.sums, row_g=None)  # known without a sum
        for c, b in maker.cols():
            tile = maker.tile(r, c, a, b, made=maker.plan.keep)
            self.kernels.softmax_gradient(tile, side, None, sums.at(r.slice, c.slice))
            out.add(tile, c, a, b, du)
        out.finish_rows(r, du, rows.grad_pairs)

    def _rows_online(
        self, maker: TileMaker, out: Accumulator, rows: _Rows, r: Chunk, a: Any
    ) -> None:
        """One pass with rescaling, as no gradient of the keys is wanted."""
        running, du = rows.running[r.slice], out.row_chunk(r)
        row_es, rescale = torch.zeros_like(running.sum), torch.empty_like(running.sum)
        for c, b in maker.cols():
            tile = maker.tile(r, c, a, b, pairs=rows.pairs)
            self.kernels.softmax_online(tile, running, row_es, rescale)
            if du is not None and not du.empty:
                du.sum *= rescale[:, None]
            out.products.gradients(tile.gradient, a, b, du, None)
        weight = rows.finish(r.slice).weight  # G = weight e^(l - max)
        if out.sums.row_gs is not None:
            out.sums.row_gs[r.slice] = row_es * weight
        if du is not None:
            du.sum *= (weight * maker.row_terms[r.slice].scale)[:, None]
        out.finish_rows(r, du, rows.grad_pairs)

    # ---- sigmoid: loss and gradient from one pass, 3 products; by rows 1 forward, 3 backward ----

    def sigmoid_rows(self, stream: Stream) -> tuple[Tensor, Pairs | None]:
        """(row sums of softplus(l_ij), the pairs on the dropped diagonal)."""
        maker, pairs = self._maker(stream), new_pairs(stream)
        loss = stream.u.new_zeros(len(stream.u), dtype=maker.dtype)
        for r, a in maker.rows():
            for c, b in maker.cols():
                tile = maker.tile(r, c, a, b, pairs=pairs)
                self.kernels.sigmoid(tile, loss[r.slice], None, False, Sums())
        return loss.to(vector_dtype(loss)), pairs

    def sigmoid_rows_backward(
        self,
        stream: Stream,
        pair_s: Tensor,
        grads: LineGradients,
        needs: Needs,
        store: torch.dtype | None = None,
    ) -> Gradients:
        """Gradients of <grads.rows, row sums> + <grads.pairs, pair logits>."""
        maker = self._maker(stream)
        out = Accumulator(maker, needs, store=store)
        if grads.rows is None:
            _pairs_only(maker, out, grads.pairs)
        else:
            weights = grads.rows.to(maker.dtype)
            maker.unit = out.expect(weights)
            for r, a in maker.rows():
                du = self._sigmoid_gradient(maker, out, r, a, None, weights, None)
                out.finish_rows(r, du, grads.pairs)
        return out.finish(grads.pairs, pair_s)

    def sigmoid_sum(self, stream: Stream, divisor: int, needs: Needs) -> tuple[Tensor, Gradients]:
        """(sum of softplus(l_ij), softplus(-l_ii) on the diagonal, over divisor; its gradients)."""
        if not any(needs):
            loss, pairs = self.sigmoid_rows(stream)
            count = paired_rows(stream)
            positive = _softplus(-_wide(pairs)[:count]).sum() if pairs is not None else 0
            return (loss.sum() + positive) / divisor, Gradients()
        maker, pairs = self._maker(stream), new_pairs(stream)
        out = Accumulator(maker, needs, store=accumulation_dtype(stream.u.dtype))
        loss = stream.u.new_zeros(len(stream.u), dtype=maker.dtype)
        weights = torch.full_like(loss, 1.0 / divisor)
        maker.unit = out.expect(weights)
        total = torch.zeros_like(loss, dtype=vector_dtype(loss))
        grad_pairs = None if pairs is None else torch.zeros_like(total)
        for r, a in maker.rows():
            du = self._sigmoid_gradient(maker, out, r, a, loss, weights, pairs)
            total[r.slice] = loss[r.slice]
            if pairs is not None and grad_pairs is not None:
                here = slice(r.start, min(r.stop, paired_rows(stream)))
                logits = _wide(pairs[here])
                total[here] += _softplus(-logits)
                grad_pairs[here] = -torch.exp(-_softplus(logits)) / divisor  # -sigmoid(-logit)
            out.finish_rows(r, du, grad_pairs)
        return total.sum() / divisor, out.finish(grad_pairs, None if pairs is None else pairs.s)

    def _sigmoid_gradient(
        self,
        maker: TileMaker,
        out: Accumulator,
        r: Chunk,
        a: Any,
        loss: Tensor | None,
        weights: Tensor,
        pairs: Pairs | None,
    ) -> Total | None:
        """One row of tiles into the accumulator; returns these rows' part of u's gradient."""
        du = out.row_chunk(r)
        row_loss = None if loss is None else loss[r.slice]
        for c, b in maker.cols():
            tile = maker.tile(r, c, a, b, pairs=pairs)
            sums = out.sums.at(r.slice, c.slice)
            self.kernels.sigmoid(tile, row_loss, weights[r.slice], True, sums)
            out.add(tile, c, a, b, du)
        return du

    # ---- L2 normalisation ----

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows divided by their L2 norm, the norms)."""
        return normalize(x)

    def normalize_backward(self, grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
        """The gradient of x, given that of its normalised rows."""
        return normalize_backward(grad, x, norm)


class _Rows:
    """The rows of a weighted logsumexp: running statistics, then values and their gradient."""

    def __init__(self, stream: Stream, weights: Tensor, add_zero: bool) -> None:
        self.running, self.pairs = _running(stream.u), new_pairs(stream)
        self.weights, self.add_zero, self.row_bias = weights, add_zero, stream.row_bias
        self.values = torch.empty_like(weights)
        self.grad_logits = torch.zeros_like(weights)  # sum_j G_ij: each row's weight on its stream

    @property
    def grad_pairs(self) -> Tensor | None:
        """The gradient with respect to the positives' logits, so far as it is known."""
        return None if self.pairs is None else -self.grad_logits

    def finish(self, rows: slice) -> Side:
        """Values and gradient of these rows from their statistics; returns their side of G."""
        running, weights = self.running[rows], self.weights[rows]
        if self.pairs is None and not self.add_zero:
            log = running.log()
            grad = torch.where(log == -torch.inf, torch.zeros_like(weights), weights)
        else:
            positive = self._positives(rows)
            margin = running.log(minus=positive)
            zero = torch.zeros_like(margin)
            if self.pairs is not None:
                zero += positive - positive  # NaN where the positive is infinite, as eager gives
            log = torch.logaddexp(margin, zero)
            grad = weights * torch.exp(margin - log)
        self.values[rows], self.grad_logits[rows] = log, grad
        return running.side(grad)

    def _positives(self, rows: slice) -> Tensor:
        """The logits against which the rows stand: the pairs', or minus the bias."""
        if self.pairs is not None:
            return self.pairs.logits[rows]
        if self.row_bias is None:
            return torch.zeros_like(self.weights[rows])
        return -self.row_bias[rows].to(self.weights.dtype)


def _running(lines: Tensor) -> Running:
    """The logsumexp of nothing yet, for each row of `lines`."""
    dtype = accumulation_dtype(lines.dtype)
    return Running(
        lines.new_full((len(lines),), -torch.inf, dtype=dtype),
        lines.new_zeros(len(lines), dtype=dtype),
    )


def _side(running: Running | None, gradient: Tensor | None) -> Side | None:
    return None if running is None or gradient is None else running.side(gradient)


def _pairs_only(maker: TileMaker, out: Accumulator, grad_pairs: Tensor | None) -> None:
    """Only the diagonal was used: no tile is made."""
    for r in maker.plan.row_chunks():
        out.finish_rows(r, out.row_chunk(r), grad_pairs)


def _wide(pairs: Pairs) -> Tensor:
    """The pairs' logits in float64."""
    return pairs.logits.to(vector_dtype(pairs.logits))


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
