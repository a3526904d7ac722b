"""From tiles to kernel launches: arguments, block shapes, and the partial sums of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastcl.kernels.tiles import Running, Side, Sums, Tile, TorchTiles
from fastcl.kernels.triton.launch_owner import OwnedGradient
from fastcl.kernels.triton.plan import KEPT, Blocks, blocks_for, small_blocks
from fastcl.kernels.triton.sigmoid import sigmoid
from fastcl.kernels.triton.softmax import gradient, merge, statistics
from fastcl.kernels.triton.support import architecture, interpreted, on_device, precision

_MERGE_BLOCK = 128


@dataclass(frozen=True)
class FusedTile(Tile):
    """A tile whose similarities are made from `u` and `v` by the kernel that wants them.

    ``s`` is where statistics keep them if `keep`, and where a gradient finds them if `made`; empty
    otherwise. Gradients go to ``room``, one matrix or two whose sum is meant, multiplied by `unit`.
    If `owned` that has no size: the gradient waits in ``pending`` until it is multiplied.
    """

    u: Tensor
    v: Tensor
    room: Tensor
    unit: Tensor | None = None
    keep: bool = False
    made: bool = False
    owned: bool = False
    multiplied: Callable[[], None] = lambda: None  # a kernel makes the similarities itself
    spare: int = 0  # bytes for what owners add up
    pending: list[OwnedGradient] = field(default_factory=list)  # replace() shares it

    @property
    def gradient(self) -> Any:
        """G after a gradient function, as GpuProducts take it."""
        return self.pending[-1] if self.owned else self.room

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.u.shape[0], self.v.shape[0]

    @property
    def blocks(self) -> Blocks:
        """How its kernels are cut."""
        dim = self.u.shape[1]
        if interpreted():
            return small_blocks(dim)
        if self.made:
            return KEPT
        split = len(self.room) == 2
        return blocks_for(self.u.element_size(), dim, architecture(self.u.device), split=split)


class TritonTiles(TorchTiles):
    """The tile functions for fused tiles: each makes the similarities that it needs.

    Other tiles (of float64, which the matrix units do not multiply) are left to PyTorch.
    """

    def softmax_statistics(self, tile: Tile, rows: Running | None, cols: Running | None) -> None:
        """Adds the tile to the running logsumexps of its rows, its columns, or both."""
        if not isinstance(tile, FusedTile):
            return super().softmax_statistics(tile, rows, cols)
        n, m = tile.shape
        of_rows = _partials(tile, rows, tile.blocks.across(m), n)
        of_cols = _partials(tile, cols, tile.blocks.down(n), m)
        _launch(
            statistics,
            tile,
            *_pairs(tile),
            tile.s,
            *of_rows,
            *of_cols,
            PAIRS=tile.pairs is not None,
            KEPT=tile.made,
            KEEP=tile.keep and not tile.made,
            ROWS=rows is not None,
            COLS=cols is not None,
        )
        _merge(of_rows, rows)
        _merge(of_cols, cols)

    def softmax_gradient(
        self, tile: Tile, rows: Side | None, cols: Side | None, sums: Sums
    ) -> None:
        """tile.gradient <- scale_i G_ij."""
        if not isinstance(tile, FusedTile):
            return super().softmax_gradient(tile, rows, cols, sums)
        self._gradient(tile, rows, cols, sums, scaled=True)

    def softmax_online(self, tile: Tile, rows: Running, row_es: Tensor, rescale: Tensor) -> None:
        """tile.gradient <- e^(l - new max); rescale <- e^(old max - new max); row_es += sum e s."""
        if not isinstance(tile, FusedTile):
            return super().softmax_online(tile, rows, row_es, rescale)
        if not tile.keep and not tile.made and not tile.owned:
            tile = replace(tile, s=tile.u.new_empty(tile.shape, dtype=torch.float32), keep=True)
        before = rows.max.clone()
        self.softmax_statistics(tile, rows, None)
        rescale.copy_(torch.exp(before - torch.where(rows.max == -torch.inf, 0.0, rows.max)))
        row_es.mul_(rescale)
        unit = Side(rows.max, torch.ones_like(rows.max))
        tile = replace(tile, made=not tile.owned, pairs=None)
        self._gradient(tile, unit, None, Sums(row_gs=row_es), scaled=False)

    def _gradient(
        self, tile: FusedTile, rows: Side | None, cols: Side | None, sums: Sums, *, scaled: bool
    ) -> None:
        if tile.owned:
            tile.pending.append(OwnedGradient(tile, rows, cols, sums, scaled))
            return
        partials = _sum_partials(tile, sums)
        _launch(
            gradient,
            tile,
            tile.s,
            *((tile.s, tile.s) if rows is None else (rows.max, rows.weight)),
            *((tile.s, tile.s) if cols is None else (cols.max, cols.weight)),
            tile.room,
            tile.rows.scale if tile.unit is None else tile.unit,
            *partials,
            KEPT=tile.made,
            SCALED=scaled,
            UNIT=tile.unit is not None,
            SPLIT=len(tile.room) == 2,
            ROWS=rows is not None,
            COLS=cols is not None,
            **_wanted(sums),
        )
        _add_up(partials, sums)

    def sigmoid(
        self,
        tile: Tile,
        row_loss: Tensor | None,
        row_weight: Tensor | None,
        gradient: bool,
        sums: Sums,
    ) -> None:
        """row_loss_i += sum_j softplus(l_ij); tile.gradient <- scale_i weight_i sigmoid(l)."""
        if not isinstance(tile, FusedTile):
            return super().sigmoid(tile, row_loss, row_weight, gradient, sums)
        if tile.owned and gradient:
            weights = None if row_weight is None else Side(row_weight, row_weight)
            owned = OwnedGradient(tile, weights, None, sums, sigmoid=True, row_loss=row_loss)
            tile.pending.append(owned)
            return
        n, m = tile.shape
        partials = _sum_partials(tile, sums)
        loss = tile.s if row_loss is None else row_loss.new_empty(tile.blocks.across(m), n)
        _launch(
            sigmoid,
            tile,
            *_pairs(tile),
            tile.s,
            tile.s if row_weight is None else row_weight,
            loss,
            tile.room,
            tile.rows.scale if tile.unit is None else tile.unit,
            *partials,
            PAIRS=tile.pairs is not None,
            KEPT=tile.made,
            WEIGHTS=row_weight is not None,
            LOSS=row_loss is not None,
            GRADIENT=gradient,
            UNIT=tile.unit is not None,
            SPLIT=len(tile.room) == 2,
            **_wanted(sums),
        )
        if row_loss is not None:
            row_loss += loss.sum(dim=0)
        _add_up(partials, sums)


def _launch(kernel: Any, tile: FusedTile, *arguments: Any, **flags: bool) -> None:
    """Runs a kernel over the blocks of a tile. Absent tensors are stood in for by the scale."""
    if not tile.made:
        tile.multiplied()
    n, m = tile.shape
    blocks, nothing = tile.blocks, tile.rows.scale
    row_bias, ids = tile.rows.bias, tile.rows.ids is not None
    with on_device(tile.u.device):
        kernel[(blocks.down(n) * blocks.across(m),)](
            tile.u,
            tile.v,
            tile.rows.scale,
            nothing if row_bias is None else row_bias,
            nothing if tile.cols.bias is None else tile.cols.bias,
            tile.rows.ids if ids else nothing,
            tile.cols.ids if ids else nothing,
            *arguments,
            n,
            m,
            0 if tile.diagonal is None else tile.diagonal,
            tile.u.stride(0),
            tile.v.stride(0),
            D=tile.u.shape[1],
            SCALES=1 + (tile.rows.scale.numel() > 1),
            ROW_BIAS=0 if row_bias is None else 1 + (row_bias.numel() > 1),
            COL_BIAS=tile.cols.bias is not None,
            IDS=ids,
            DIAGONAL=tile.diagonal is not None,
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_K=blocks.k,
            GROUP=blocks.group,
            PRECISION=precision(tile.u.dtype),
            UPCAST=interpreted() and tile.u.dtype == torch.bfloat16,
            FAST=tile.u.dtype != torch.float32,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **flags,
        )


def _pairs(tile: FusedTile) -> tuple[Tensor, Tensor]:
    return (tile.s, tile.s) if tile.pairs is None else (tile.pairs.s, tile.pairs.logits)


def _partials(
    tile: FusedTile, running: Running | None, blocks: int, lines: int
) -> tuple[Tensor, Tensor]:
    """Room for a maximum and a sum of each line in each block."""
    if running is None:
        return tile.s, tile.s
    both = running.max.new_empty(2, blocks, lines)
    return both[0], both[1]


def _merge(partials: tuple[Tensor, Tensor], running: Running | None) -> None:
    if running is None:
        return
    blocks, lines = partials[0].shape
    grid = (-(-lines // _MERGE_BLOCK),)
    with on_device(running.max.device):
        merge[grid](*partials, running.max, running.sum, lines, blocks, BLOCK=_MERGE_BLOCK)


def _wanted(sums: Sums) -> dict[str, bool]:
    return {
        "ROW_GS": sums.row_gs is not None,
        "ROW_G": sums.row_g is not None,
        "COL_G": sums.col_g is not None,
    }


def _sum_partials(tile: FusedTile, sums: Sums) -> list[Tensor]:
    """Room for the sums of each block."""
    n, m = tile.shape
    across, down = tile.blocks.across(m), tile.blocks.down(n)
    sizes = ((sums.row_gs, across), (sums.row_g, across), (sums.col_g, down))
    return [tile.s if x is None else x.new_empty(blocks, len(x)) for x, blocks in sizes]


def _add_up(partials: list[Tensor], sums: Sums) -> None:
    """Adds the blocks' sums to those of the lines, in a fixed order."""
    for total, partial in zip((sums.row_gs, sums.row_g, sums.col_g), partials, strict=True):
        if total is not None:
            total += partial.sum(dim=0)
