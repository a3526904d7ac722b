"""Gradients by their owners: what a tile function leaves to the products, and its launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcl.kernels.tiles import ColTerms, RowTerms, Side, Sums
from fastcl.kernels.triton.owner import owned_gradient
from fastcl.kernels.triton.plan import OwnerBlocks, owner_blocks, owner_parts, small_owner_blocks
from fastcl.kernels.triton.support import (
    architecture,
    interpreted,
    on_device,
    precision,
    processors,
)
from fastcl.kernels.walk import Total

if TYPE_CHECKING:
    from fastcl.kernels.triton.launch import FusedTile


@dataclass(frozen=True)
class OwnedGradient:
    """G of a tile, not made yet: its sums, and its products with either side, are one launch each.

    ``rows`` and ``cols`` are the sides of a softmax; of a sigmoid, ``rows`` holds the weights.
    """

    tile: FusedTile
    rows: Side | None
    cols: Side | None
    sums: Sums
    scaled: bool = True
    sigmoid: bool = False
    row_loss: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of G."""
        return self.tile.shape

    def into(self, da: Total | None, db: Total | None) -> None:
        """da += g b and db += g^T a, each where it is wanted, and all sums."""
        tile, sums = self.tile, self.sums
        by_row = (self.row_loss, sums.row_gs, sums.row_g, tile.pairs)
        if da is not None or any(x is not None for x in by_row):
            self._walk(da, _Side(tile.u, tile.rows, self.rows), _Side(tile.v, tile.cols, self.cols))
        if db is not None or sums.col_g is not None:
            self._walk(
                db,
                _Side(tile.v, tile.cols, self.cols),
                _Side(tile.u, tile.rows, self.rows),
                transposed=True,
            )

    def _walk(
        self, total: Total | None, own: _Side, other: _Side, *, transposed: bool = False
    ) -> None:
        """One launch: every owned line with all of the others."""
        tile, sums, nothing = self.tile, self.sums, self.tile.rows.scale
        n, m, dim = len(own.x), len(other.x), own.x.shape[1]
        blocks = _blocks(own.x)
        parts = owner_parts(n, m, blocks, processors(own.x.device))
        gs, g, loss = (
            (None, sums.col_g, None) if transposed else (sums.row_gs, sums.row_g, self.row_loss)
        )
        made = [None if x is None else x.new_empty(parts, n) for x in (loss, gs, g)]
        direct = total is not None and parts == 1 and total.empty
        out = None
        if total is not None:
            width = total.sum.shape[1]
            out = total.sum if direct else total.sum.new_empty(parts, n, width)
        pairs = None if transposed else tile.pairs
        diagonal = 0 if tile.diagonal is None else tile.diagonal
        with on_device(own.x.device):
            owned_gradient[(blocks.down(n), parts)](
                own.x,
                other.x,
                tile.rows.scale,
                *(_or(x, nothing) for x in (own.bias, other.bias, own.ids, other.ids)),
                *own.lines(nothing),
                *other.lines(nothing),
                _or(tile.unit, nothing),
                *((nothing, nothing) if pairs is None else (pairs.s, pairs.logits)),
                *(_or(x, nothing) for x in made),
                _or(out, nothing),
                n,
                m,
                -diagonal if transposed else diagonal,
                -(-blocks.across(m) // parts),
                own.x.stride(0),
                other.x.stride(0),
                D=dim,
                D_OUT=dim if total is None else total.sum.shape[1],
                TRANSPOSED=transposed,
                SIGMOID=self.sigmoid,
                SCALES=1 + (tile.rows.scale.numel() > 1),
                OWN_BIAS=own.kind_of_bias,
                OTHER_BIAS=other.kind_of_bias,
                IDS=tile.rows.ids is not None,
                DIAGONAL=tile.diagonal is not None,
                OWN=own.side is not None,
                OTHER=other.side is not None,
                PAIRS=pairs is not None,
                SCALED=self.scaled,
                LOSS=loss is not None,
                SUM_GS=gs is not None,
                SUM_G=g is not None,
                PRODUCT=out is not None,
                SPLIT=len(tile.room) == 2,
                UNIT=tile.unit is not None,
                BLOCK_M=blocks.m,
                BLOCK_N=blocks.n,
                BLOCK_D=blocks.d,
                PRECISION=precision(own.x.dtype),
                UPCAST=interpreted() and own.x.dtype == torch.bfloat16,
                FAST=own.x.dtype != torch.float32,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )
        for sum_of_lines, parts_of_it in zip((loss, gs, g), made, strict=True):
            if sum_of_lines is not None and parts_of_it is not None:
                sum_of_lines += parts_of_it.sum(dim=0)
        if total is not None and out is not None:
            first = total.begin()
            if first and not direct:
                torch.sum(out, dim=0, out=total.sum)
            elif not first:
                total.sum += out.sum(dim=0)


@dataclass(frozen=True)
class _Side:
    """One side of a tile: its embeddings, its terms of the logits, its side of G."""

    x: Tensor
    terms: RowTerms | ColTerms
    side: Side | None

    @property
    def bias(self) -> Tensor | None:
        return self.terms.bias

    @property
    def ids(self) -> Tensor | None:
        return self.terms.ids

    @property
    def kind_of_bias(self) -> int:
        """0: none, 1: one number for all, 2: one for each line."""
        return 0 if self.bias is None else 1 + (self.bias.numel() > 1)

    def lines(self, nothing: Tensor) -> tuple[Tensor, Tensor]:
        return (nothing, nothing) if self.side is None else (self.side.max, self.side.weight)


def _or(x: Tensor | None, nothing: Tensor) -> Tensor:
    """Absent tensors are stood in for by one that is there."""
    return nothing if x is None else x


def _blocks(x: Tensor) -> OwnerBlocks:
    if interpreted():
        return small_owner_blocks(x.shape[1])
    return owner_blocks(x.shape[1], architecture(x.device))
