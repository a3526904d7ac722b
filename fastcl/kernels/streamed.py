"""The streamed primitives as walks over tiles, for any set of tile kernels.

Costs are in units of one N x M x D matrix product, 2NMD; see docs/architecture.md for the floors.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastcl.kernels.dispatch import Gradients, Needs, Stream
from fastcl.kernels.plan import plan_symmetric, plan_tiles
from fastcl.kernels.tiles import LN2, LOG2E, Running, Side, Sums, TileKernels
from fastcl.kernels.walk import (
    Accumulator,
    Products,
    TileMaker,
    TorchProducts,
    accumulation_dtype,
    diagonal_similarities,
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

    def _maker(self, stream: Stream, *, keep: bool = False) -> TileMaker:
        products = self.products(stream)
        n, m = stream.u.shape[0], stream.keys.shape[0]
        itemsize, line = products.storage(stream.u.shape[1])
        if stream.v is None:
            plan = plan_symmetric(n, itemsize, stream.workspace, line_bytes=line)
        else:
            plan = plan_tiles(
                n, m, itemsize, stream.workspace, keep=keep, tile=_KEPT_TILE, line_bytes=line
            )
            if not plan.keep:
                plan = plan_tiles(n, m, itemsize, stream.workspace, line_bytes=line)
        return TileMaker(stream, plan, products)

    # ---- logsumexp: 1 product forward, 3 backward (half of each where v is u) ----

    def logsumexp(self, stream: Stream, rows: bool, cols: bool) -> tuple[Tensor | None, ...]:
        """(row logsumexps, column logsumexps, raw similarities on the diagonal)."""
        maker = self._maker(stream)
        of_rows = _running(stream.u) if rows else None
        of_cols = _running(stream.keys) if cols else None
        for r, a in maker.rows():
            for c, b in maker.cols(start=r.start if stream.v is None else 0):
                tile = maker.tile(r, c, a, b, stream.row_bias)
                row_part = None if of_rows is None else of_rows[r.slice]
                col_part = None if of_cols is None else of_cols[c.slice]
                if stream.v is None and of_rows is not None:
                    # Above the diagonal a tile's columns are rows of its mirror image.
                    col_part = of_rows[c.slice] if c.start > r.start else None
                self.kernels.softmax_statistics(tile, row_part, col_part)
        return (
            None if of_rows is None else of_rows.log2() * LN2,
            None if of_cols is None else of_cols.log2() * LN2,
            diagonal_similarities(stream),
        )

    def logsumexp_backward(
        self,
        stream: Stream,
        row_lse: Tensor | None,
        col_lse: Tensor | None,
        grad_rows: Tensor | None,
        grad_cols: Tensor | None,
        grad_diagonal: Tensor | None,
        needs: Needs,
    ) -> Gradients:
        """Gradients of <grad_rows, row_lse> + <grad_cols, col_lse> + <grad_diagonal, diagonal>."""
        maker = self._maker(stream)
        out = Accumulator(stream, needs, maker.products)
        rows, cols = _side(row_lse, grad_rows), _side(col_lse, grad_cols)
        if rows is None and cols is None:
            return self._pairs_only(maker, out, grad_diagonal)
        if stream.v is None:
            return self._symmetric_backward(maker, out, rows, grad_diagonal)
        for r, a in maker.rows():
            du = out.row_chunk(r)
            for c, b in maker.cols():
                tile = maker.tile(r, c, a, b, stream.row_bias)
                self.kernels.softmax_gradient(
                    tile,
                    None if rows is None else rows[r.slice],
                    None if cols is None else cols[c.slice],
                    out.sums.at(r.slice, c.slice),
                )
                out.add(tile, c, a, b, du)
            out.finish_rows(r, du, grad_diagonal)
        return out.finish(grad_diagonal)

    def _pairs_only(
        self, maker: TileMaker, out: Accumulator, grad_diagonal: Tensor | None
    ) -> Gradients:
        """Only the diagonal was used: no tile is made."""
        for r in maker.plan.row_chunks():
            out.finish_rows(r, out.row_chunk(r), grad_diagonal)
        return out.finish(grad_diagonal)

    def _symmetric_backward(
        self, maker: TileMaker, out: Accumulator, side: Side | None, grad_diagonal: Tensor | None
    ) -> Gradients:
        """dU = (G + G^T) U from half of the tiles; H = G + G^T is symmetric too."""
        assert side is not None
        row_gs = out.sums.row_gs
        within = None if row_gs is None else torch.zeros_like(row_gs)
        for r, a in maker.rows():
            for c, b in maker.cols(start=r.start):
                tile = maker.tile(r, c, a, b, None)
                # A tile on the diagonal holds both (i, j) and (j, i): H counts its pairs twice.
                gs = within if c.start == r.start else row_gs
                sums = Sums(row_gs=None if gs is None else gs[r.slice])
                self.kernels.softmax_gradient(tile, side[r.slice], side[c.slice], sums)
                if out.dv is None:
                    continue
                mirrored = out.dv[c.slice] if c.start > r.start else None
                out.products.gradients(tile.s, a, b, out.dv[r.slice], mirrored)
        return out.finish(
            grad_diagonal, None if within is None else lambda per_row: per_row + within / 2
        )

    # ---- weighted sum of row logsumexps, gradient made in the forward: 3 products (2 + 1 more
    #      where rows of tiles do not fit; 2 in all where only the query needs a gradient) ----

    def weighted_logsumexp(
        self, stream: Stream, weights: Tensor | None, add_zero: bool, needs: Needs
    ) -> tuple[Tensor, Gradients]:
        """(the row values y_i, gradients of sum_i weights_i y_i)."""
        pairs = diagonal_similarities(stream)
        row_bias = stream.row_bias
        if pairs is not None:  # logits relative to the positive's: y = log(1 + sum e^(l - l_pos))
            row_bias = -_positive_logits(stream, pairs)
        zero = add_zero or pairs is not None
        running = _running(stream.u, zero=zero)
        weights = torch.ones_like(running.max) if weights is None else weights
        maker = self._maker(stream, keep=any(needs))
        out = Accumulator(stream, needs, maker.products, store=_stored(stream.u.dtype))
        online = not (maker.plan.keep or needs.v or needs.col_bias) and any(needs)
        walk = self._walk_online if online else self._walk_in_rows
        values, grad_logits = walk(maker, out, row_bias, running, weights, zero, needs)
        # grad_logits_i = sum_j G_ij: the gradient with respect to the row bias.
        if pairs is None:
            if out.sums.row_g is not None:
                out.sums.row_g.copy_(grad_logits)
            return values, out.finish(None)
        if out.sums.col_g is not None and stream.diagonal is not None:
            out.sums.col_g[stream.diagonal :][: len(pairs)] -= grad_logits
        grad_pairs = -grad_logits * stream.scale
        return values, out.finish(grad_pairs, lambda per_row: per_row - grad_logits * pairs)

    def _walk_in_rows(
        self,
        maker: TileMaker,
        out: Accumulator,
        row_bias: Tensor | None,
        running: Running,
        weights: Tensor,
        zero: bool,
        needs: Needs,
    ) -> tuple[Tensor, Tensor]:
        """Row by row of tiles: statistics, then the gradient, from kept tiles or from new ones."""
        values, grad_logits = torch.empty_like(weights), torch.empty_like(weights)
        for r, a in maker.rows():
            for c, b in maker.cols():
                tile = maker.tile(r, c, a, b, row_bias)
                self.kernels.softmax_statistics(tile, running[r.slice], None)
            log2 = running[r.slice].log2()
            values[r.slice] = log2 * LN2
            grad_logits[r.slice] = _row_gradient(weights[r.slice], values[r.slice], zero)
            if not any(needs):
                continue
            side, du = Side(log2, weights[r.slice]), out.row_chunk(r)
            sums = replace(out.sums, row_g=None)  # known without a sum: grad_logits
            for c, b in maker.cols():
                tile = maker.tile(r, c, a, b, row_bias, made=maker.plan.keep)
                self.kernels.softmax_gradient(tile, side, None, sums.at(r.slice, c.slice))
                out.add(tile, c, a, b, du)
            out.finish_rows(r, du, self._grad_pairs(maker.stream, grad_logits, r.stop))
        return values, grad_logits

    def _walk_online(
        self,
        maker: TileMaker,
        out: Accumulator,
        row_bias: Tensor | None,
        running: Running,
        weights: Tensor,
        zero: bool,
        needs: Needs,
    ) -> tuple[Tensor, Tensor]:
        """One pass with rescaling, as no gradient of the keys is wanted: 2 products."""
        values, grad_logits = torch.empty_like(weights), torch.empty_like(weights)
        row_es = torch.zeros_like(weights)
        for r, a in maker.rows():
            du, rescale = out.row_chunk(r), torch.empty_like(weights[r.slice])
            part = running[r.slice]
            for c, b in maker.cols():
                tile = maker.tile(r, c, a, b, row_bias)
                self.kernels.softmax_online(tile, part, row_es[r.slice], rescale)
                if du is not None:
                    out.products.gradients(tile.s, a, b, du.mul_(rescale[:, None]), None)
            values[r.slice] = part.log2() * LN2
            grad_logits[r.slice] = _row_gradient(weights[r.slice], values[r.slice], zero)
            # G = weight * p, with p = 2^(l - max) / sum; an empty row has sum 0 and no gradient.
            factor = torch.where(part.sum == 0, part.sum, weights[r.slice] / part.sum)
            if out.sums.row_gs is not None:
                out.sums.row_gs[r.slice] = row_es[r.slice] * factor
            if du is not None:
                scale = maker.stream.scale
                du *= (factor * (scale if scale.numel() == 1 else scale[r.slice]))[:, None]
            out.finish_rows(r, du, self._grad_pairs(maker.stream, grad_logits, r.stop))
        return values, grad_logits

    @staticmethod
    def _grad_pairs(stream: Stream, grad_logits: Tensor, stop: int) -> Tensor | None:
        if stream.diagonal is None:
            return None
        scale = stream.scale if stream.scale.numel() == 1 else stream.scale[:stop]
        return -grad_logits[:stop] * scale

    # ---- sigmoid: loss and gradient from one pass, 3 products; by rows 1 forward, 3 backward ----

    def sigmoid_rows(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """(row sums of softplus(l_ij), raw similarities on the diagonal)."""
        maker = self._maker(stream)
        loss = stream.u.new_zeros(len(stream.u), dtype=maker.dtype)
        for r, a in maker.rows():
            for c, b in maker.cols():
                tile = maker.tile(r, c, a, b, stream.row_bias)
                self.kernels.sigmoid(tile, loss[r.slice], None, False, Sums())
        return loss, diagonal_similarities(stream)

    def sigmoid_rows_backward(
        self, stream: Stream, grad_rows: Tensor | None, grad_diagonal: Tensor | None, needs: Needs
    ) -> Gradients:
        """Gradients of <grad_rows, row sums> + <grad_diagonal, diagonal>."""
        maker = self._maker(stream)
        out = Accumulator(stream, needs, maker.products)
        if grad_rows is None:
            return self._pairs_only(maker, out, grad_diagonal)
        self._sigmoid_walk(maker, out, None, grad_rows, grad_diagonal)
        return out.finish(grad_diagonal)

    def sigmoid_sum(self, stream: Stream, needs: Needs) -> tuple[Tensor, Gradients]:
        """(sum of softplus(l_ij) plus softplus(-l_ii) on the diagonal, its gradients)."""
        pairs = diagonal_similarities(stream)
        if not any(needs):
            total = self.sigmoid_rows(stream)[0].sum()
            return _with_positives(stream, pairs, total)[0], Gradients()
        maker = self._maker(stream)
        out = Accumulator(stream, needs, maker.products, store=_stored(stream.u.dtype))
        loss = stream.u.new_zeros(len(stream.u), dtype=maker.dtype)
        zero = loss.new_zeros(())
        positive, grad_logits = _with_positives(stream, pairs, zero)
        grad_pairs = None
        if pairs is not None and grad_logits is not None:
            scale = stream.scale if stream.scale.numel() == 1 else stream.scale[: len(pairs)]
            grad_pairs = grad_logits * scale
        self._sigmoid_walk(maker, out, loss, None, grad_pairs)
        if pairs is None or grad_logits is None or stream.diagonal is None:
            return loss.sum() + positive, out.finish(None)
        if out.sums.row_g is not None:
            out.sums.row_g[: len(pairs)] += grad_logits
        if out.sums.col_g is not None:
            out.sums.col_g[stream.diagonal :][: len(pairs)] += grad_logits
        if out.sums.row_gs is not None:
            out.sums.row_gs[: len(pairs)] += grad_logits * pairs
        return loss.sum() + positive, out.finish(grad_pairs)

    def _sigmoid_walk(
        self,
        maker: TileMaker,
        out: Accumulator,
        loss: Tensor | None,
        weights: Tensor | None,
        grad_pairs: Tensor | None,
    ) -> None:
        for r, a in maker.rows():
            du = out.row_chunk(r)
            for c, b in maker.cols():
                tile = maker.tile(r, c, a, b, maker.stream.row_bias)
                self.kernels.sigmoid(
                    tile,
                    None if loss is None else loss[r.slice],
                    None if weights is None else weights[r.slice],
                    True,
                    out.sums.at(r.slice, c.slice),
                )
                out.add(tile, c, a, b, du)
            out.finish_rows(r, du, grad_pairs)


def _running(lines: Tensor, *, zero: bool = False) -> Running:
    """The logsumexp of nothing yet, or of a single logit 0, for each row of `lines`."""
    dtype = accumulation_dtype(lines.dtype)
    start = 0.0 if zero else -torch.inf
    return Running(
        lines.new_full((len(lines),), start, dtype=dtype),
        lines.new_full((len(lines),), float(zero), dtype=dtype),
    )


def _side(lse: Tensor | None, weight: Tensor | None) -> Side | None:
    if lse is None or weight is None:
        return None
    return Side((lse * LOG2E).contiguous(), weight.contiguous())


def _stored(dtype: torch.dtype) -> torch.dtype:
    """In what a gradient made in the forward waits: float16 could overflow at unit weight."""
    return torch.float32 if dtype == torch.float16 else dtype


def _positive_logits(stream: Stream, pairs: Tensor) -> Tensor:
    logits = pairs * stream.scale
    if stream.col_bias is not None and stream.diagonal is not None:
        logits = logits + stream.col_bias[stream.diagonal :][: len(pairs)]
    return logits


def _row_gradient(weights: Tensor, values: Tensor, zero: bool) -> Tensor:
    """sum_j G_ij: the row's whole weight, less the share of the added zero (the positive)."""
    if zero:
        return -weights * torch.expm1(-values)
    return torch.where(values == -torch.inf, torch.zeros_like(weights), weights)


def _with_positives(
    stream: Stream, pairs: Tensor | None, total: Tensor
) -> tuple[Tensor, Tensor | None]:
    """total + sum_i softplus(-l_ii), and the gradient with respect to each l_ii."""
    if pairs is None or stream.diagonal is None:
        return total, None
    rows = len(pairs)
    logits = pairs * (stream.scale if stream.scale.numel() == 1 else stream.scale[:rows])
    if stream.row_bias is not None:
        row_bias = stream.row_bias
        logits = logits + (row_bias if row_bias.numel() == 1 else row_bias[:rows])
    if stream.col_bias is not None:
        logits = logits + stream.col_bias[stream.diagonal :][:rows]
    loss = torch.logaddexp(-logits, torch.zeros_like(logits))
    return total + loss.sum(), -torch.sigmoid(-logits)
