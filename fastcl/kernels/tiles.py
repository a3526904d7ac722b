"""What runs on one tile, and the portable version of it in plain PyTorch.

The same functions exist compiled (:mod:`fastcl.kernels.cpu`). A tile is a block of raw similarities
s; its logits are l = scale s + biases, -inf where a pair is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fastcl.kernels.dtypes import vector_dtype

_L = TypeVar("_L", bound="Lines")


class Lines:
    """Vectors with a number for each line, that is for each row or for each column.

    A vector may be None, and one number may stand for all lines.
    """

    def __getitem__(self: _L, lines: slice) -> _L:
        """Views of these lines, made once: a walk asks for the same ones at many tiles.

        (They are views, so what is written to one is seen in all; no vector is ever rebound.)
        """
        parts: dict[tuple[int, int], _L] = self.__dict__.setdefault("_parts", {})
        key = lines.start, lines.stop
        if key not in parts:
            vectors = (getattr(self, x.name) for x in fields(self))  # type: ignore[arg-type]
            parts[key] = type(self)(*(_part(x, lines) for x in vectors))
        return parts[key]


def _part(x: Tensor | None, lines: slice) -> Tensor | None:
    if x is None:
        return None
    one_for_all = x.dim() == 0 or (x.numel() == 1 and lines.start < lines.stop)
    return x.reshape(1) if one_for_all else x[lines]


@dataclass(frozen=True)
class RowTerms(Lines):
    """What the rows bring to their logits: a scale and a bias, one or one per row; their ids."""

    scale: Tensor
    bias: Tensor | None = None
    ids: Tensor | None = None


@dataclass(frozen=True)
class ColTerms(Lines):
    """What the columns bring to their logits."""

    bias: Tensor | None = None
    ids: Tensor | None = None


@dataclass(frozen=True)
class Pairs(Lines):
    """What the stream left out, one per row: raw similarities, and logits."""

    s: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Tile:
    """A block of raw similarities s with everything that turns them into logits.

    ``diagonal`` is the column of the first row's dropped pair (it may lie outside the tile), or
    None. Where ``pairs`` is given, the functions write the dropped pairs' s and l into it: a
    positive whose logit was rounded like the others' cancels against them exactly.
    """

    s: Tensor
    rows: RowTerms
    cols: ColTerms
    diagonal: int | None
    pairs: Pairs | None

    @property
    def gradient(self) -> Tensor:
        """Where the gradient functions leave theirs: in place of the similarities."""
        return self.s


@dataclass(frozen=True)
class Running(Lines):
    """A running logsumexp for each line: value = max + log(sum)."""

    max: Tensor
    sum: Tensor

    def log(self, minus: Tensor | None = None) -> Tensor:
        """The logsumexp, -inf for an empty line; `minus` is taken off before rounding.

        In float64 where the device has it: maximum and sum may differ in magnitude by the digits
        that a small loss consists of.
        """
        dtype = vector_dtype(self.max)
        top = self.max.to(dtype)
        if minus is not None:
            top = top - minus.to(dtype)
        return top + self.sum.to(dtype).log()

    def side(self, gradient: Tensor) -> Side:
        """The side of G that these lines give, whose logsumexps have that gradient."""
        share = gradient / self.sum.to(gradient.dtype)
        weight = torch.where(self.sum == 0, torch.zeros_like(share), share)  # empty: no gradient
        return Side(self.max, weight.to(self.max.dtype))


@dataclass(frozen=True)
class Side(Lines):
    """One side of G_ij = sum over sides of weight * e^(l_ij - max); see Running.side."""

    max: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Sums:
    """Line sums of gradient tiles, added to: sum_j G s, sum_j G, sum_i G. None: not wanted."""

    row_gs: Tensor | None = None
    row_g: Tensor | None = None
    col_g: Tensor | None = None

    def at(self, rows: slice, cols: slice) -> Sums:
        """The part that belongs to one tile."""
        row_gs, row_g, col_g = self.row_gs, self.row_g, self.col_g
        return Sums(
            None if row_gs is None else row_gs[rows],
            None if row_g is None else row_g[rows],
            None if col_g is None else col_g[cols],
        )


class TileKernels(Protocol):
    """The functions. All write into what they are given; G goes to ``tile.gradient``."""

    def softmax_statistics(self, tile: Tile, rows: Running | None, cols: Running | None) -> None:
        """Adds the tile to the running logsumexps of its rows, its columns, or both."""

    def softmax_gradient(
        self, tile: Tile, rows: Side | None, cols: Side | None, sums: Sums
    ) -> None:
        """tile.gradient <- scale_i G_ij."""

    def softmax_online(self, tile: Tile, rows: Running, row_es: Tensor, rescale: Tensor) -> None:
        """tile.gradient <- p = e^(l - new max); row_es accumulates sum_j p s_j.

        rescale <- e^(old max - new max), for what was accumulated before.
        """

    def sigmoid(
        self,
        tile: Tile,
        row_loss: Tensor | None,
        row_weight: Tensor | None,
        gradient: bool,
        sums: Sums,
    ) -> None:
        """row_loss_i += sum_j softplus(l_ij); with `gradient`, G = scale_i weight_i sigmoid(l)."""


def _line(x: Tensor) -> Tensor:
    return x.reshape(-1, 1)


def _logits(tile: Tile) -> Tensor:
    logits = tile.s * _line(tile.rows.scale)
    if tile.rows.bias is not None:
        logits += _line(tile.rows.bias)
    if tile.cols.bias is not None:
        logits += tile.cols.bias
    if tile.diagonal is not None and -tile.s.shape[0] < tile.diagonal < tile.s.shape[1]:
        dropped = torch.diagonal(logits, tile.diagonal)
        if tile.pairs is not None:
            first = max(0, -tile.diagonal)
            here = slice(first, first + len(dropped))
            tile.pairs.logits[here] = dropped
            tile.pairs.s[here] = torch.diagonal(tile.s, tile.diagonal)
        dropped.fill_(-torch.inf)
    if tile.rows.ids is not None and tile.cols.ids is not None:
        logits.masked_fill_(_line(tile.rows.ids) == tile.cols.ids, -torch.inf)
    return logits


def _finite_or_zero(x: Tensor) -> Tensor:
    # An empty line has maximum -inf; as a reference point it would make NaN of (-inf) - (-inf).
    return torch.where(x == -torch.inf, torch.zeros_like(x), x)


def _exp_below(x: Tensor) -> Tensor:
    """e^x of logits less their maximum, which is of a tile made before: a last bit may differ."""
    return torch.exp(x.clamp_max(0.0))


def _flush(s: Tensor) -> None:
    """Zero in place of float32 numbers so small that products with them are subnormal, and slow."""
    if s.dtype == torch.float32:
        s.masked_fill_(s.abs() < 2.0**-110, 0.0)


class TorchTiles:
    """The tile functions in plain PyTorch: any device, no compiler."""

    def softmax_statistics(self, tile: Tile, rows: Running | None, cols: Running | None) -> None:
        logits = _logits(tile)
        for running, dim in ((rows, 1), (cols, 0)):
            if running is None:
                continue
            new_max = torch.maximum(running.max, logits.amax(dim=dim))
            ref = _finite_or_zero(new_max)
            here = torch.exp(logits - ref.unsqueeze(dim)).sum(dim=dim)
            running.sum.mul_(torch.exp(running.max - ref)).add_(here)
            running.max.copy_(new_max)

    def softmax_gradient(
        self, tile: Tile, rows: Side | None, cols: Side | None, sums: Sums
    ) -> None:
        logits = _logits(tile)
        g = torch.zeros_like(logits)
        if rows is not None:
            g += _exp_below(logits - _line(_finite_or_zero(rows.max))) * _line(rows.weight)
        if cols is not None:
            g += _exp_below(logits - _finite_or_zero(cols.max)) * cols.weight
        self._finish(tile, g, sums)

    def softmax_online(self, tile: Tile, rows: Running, row_es: Tensor, rescale: Tensor) -> None:
        logits = _logits(tile)
        new_max = torch.maximum(rows.max, logits.amax(dim=1))
        ref = _finite_or_zero(new_max)
        e = torch.exp(logits - _line(ref))
        rescale.copy_(torch.exp(rows.max - ref))
        rows.sum.mul_(rescale).add_(e.sum(dim=1))
        row_es.mul_(rescale).add_((e * tile.s).sum(dim=1))
        rows.max.copy_(new_max)
        tile.s.copy_(e)
        _flush(tile.s)

    def sigmoid(
        self,
        tile: Tile,
        row_loss: Tensor | None,
        row_weight: Tensor | None,
        gradient: bool,
        sums: Sums,
    ) -> None:
        logits = _logits(tile)
        if row_loss is not None:
            tails = torch.log1p(torch.exp(-logits.abs()))
            row_loss.add_((logits.clamp_min(0) + tails).sum(dim=1))
        if gradient:
            g = torch.sigmoid(logits)
            if row_weight is not None:
                g *= _line(row_weight)
            self._finish(tile, g, sums)

    @staticmethod
    def _finish(tile: Tile, g: Tensor, sums: Sums) -> None:
        if sums.row_gs is not None:
            sums.row_gs.add_((g * tile.s).sum(dim=1))
        if sums.row_g is not None:
            sums.row_g.add_(g.sum(dim=1))
        if sums.col_g is not None:
            sums.col_g.add_(g.sum(dim=0))
        torch.mul(g, _line(tile.rows.scale), out=tile.s)
        _flush(tile.s)
