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

    def into(self, da: Total | None, db: Total | None) -> None:
        """da += g b and db += g^T a, each where it is wanted, and all sums."""
        tile, sums = self.tile, self.sums
        rows = _Half(tile.u, tile.rows, self.rows, (self.row_loss, sums.row_gs, sums.row_g))
        cols = _Half(tile.v, tile.cols, self.cols, (None, None, sums.col_g))
        if da is not None or tile.pairs is not None or rows.has_sums:
            self._walk(da, rows, cols, transposed=False)
        if db is not None or cols.has_sums:
            self._walk(db, cols, rows, transposed=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what would be stored: matrices whose sum is meant, rows, columns."""
        return len(self.tile.room), *self.tile.shape

    def _walk(self, total: Total | None, own: _Half, other: _Half, *, transposed: bool) -> None:
        """Every owned line meets all of the others, in parts whose results are added in order."""
        n, width = len(own.x), 0 if total is None else total.sum.shape[1]
        blocks, device = _blocks(own.x), own.x.device
        parts = owner_parts(n, len(other.x), blocks, processors(device), self.tile.spare)
        sums = [None if x is None else x.new_empty(parts, n) for x in own.sums]
        first = total is not None and total.begin()
        out = None
        if total is not None:
            alone = first and parts == 1
            out = total.sum if alone else total.sum.new_empty(parts, n, width)
        self._launch(own, other, blocks, parts, sums, out, width, transposed)
        for whole, in_parts in zip(own.sums, sums, strict=True):
            if whole is not None and in_parts is not None:
                whole += in_parts.sum(dim=0)
        if total is None or out is None or out is total.sum:
            return
        if first:
            torch.sum(out, dim=0, out=total.sum)
        else:
            total.sum += out.sum(dim=0)

    def _launch(
        self,
        own: _Half,
        other: _Half,
        blocks: OwnerBlocks,
        parts: int,
        sums: list[Tensor | None],
        out: Tensor | None,
        width: int,
        transposed: bool,
    ) -> None:
        """Absent tensors are stood in for by the scale."""
        self.tile.multiplied()
        tile, nothing = self.tile, self.tile.rows.scale
        pairs = None if transposed else tile.pairs
        diagonal = 0 if tile.diagonal is None else tile.diagonal
        present: tuple[Tensor | None, ...] = (
            tile.rows.scale,
            *(own.terms.bias, other.terms.bias, own.terms.ids, other.terms.ids),
            *(own.lines + other.lines),
            tile.unit,
            *((None, None) if pairs is None else (pairs.s, pairs.logits)),
            *sums,
            out,
        )
        with on_device(own.x.device):
            owned_gradient[(blocks.down(len(own.x)), parts)](
                own.x,
                other.x,
                *(nothing if x is None else x for x in present),
                len(own.x),
                len(other.x),
                -diagonal if transposed else diagonal,
                -(-blocks.across(len(other.x)) // parts),
                own.x.stride(0),
                other.x.stride(0),
                D=own.x.shape[1],
                D_OUT=width,
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
                LOSS=sums[0] is not None,
                SUM_GS=sums[1] is not None,
                SUM_G=sums[2] is not None,
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


@dataclass(frozen=True)
class _Half:
    """Rows or columns: their embeddings, terms of the logits, side of G, and the sums they want.

    The sums are those of the loss, of G s, and of G.
    """

    x: Tensor
    terms: RowTerms | ColTerms
    side: Side | None
    sums: tuple[Tensor | None, Tensor | None, Tensor | None]

    @property
    def has_sums(self) -> bool:
        return any(x is not None for x in self.sums)

    @property
    def kind_of_bias(self) -> int:
        """0: none, 1: one number for all, 2: one for each line."""
        bias = self.terms.bias
        return 0 if bias is None else 1 + (bias.numel() > 1)

    @property
    def lines(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.side is None else (self.side.max, self.side.weight)


def _blocks(x: Tensor) -> OwnerBlocks:
    if interpreted():
        return small_owner_blocks(x.shape[1])
    return owner_blocks(x.shape[1], architecture(x.device))
