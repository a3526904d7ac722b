"""The compiled extension as tile kernels, and the backend made of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcl.kernels.cpu.amx import AmxProducts
from fastcl.kernels.dispatch import Stream
from fastcl.kernels.streamed import StreamedPrimitives
from fastcl.kernels.tiles import Running, Side, Sums, Tile
from fastcl.kernels.walk import Products

_extension: ModuleType | None
_why_not = ""
try:
    # torch was imported above: its OpenMP runtime is the one that the extension finds and shares.
    import fastcl._C as _extension  # type: ignore[import-not-found,no-redef,unused-ignore]
except ImportError as error:
    _extension, _why_not = None, str(error)

NOT_BUILT = (
    "fastcl's compiled CPU kernels are not installed ({why}); the portable PyTorch kernels are "
    "used instead, which are slower. Reinstall with a C++17 compiler and Python's headers present"
)


def missing_extension() -> str | None:
    """Why there are no compiled kernels, or None where there are."""
    return NOT_BUILT.format(why=_why_not) if _extension is None else None


def _at(x: Tensor | None) -> int:
    """The address of a contiguous vector, 0 for None. The caller keeps the tensor alive."""
    return 0 if x is None else x.data_ptr()


def _line(x: Running | Side | None) -> tuple[int, int]:
    if x is None:
        return 0, 0
    return _at(x.max), _at(x.sum if isinstance(x, Running) else x.weight)


def _sums(sums: Sums) -> tuple[int, int, int]:
    return _at(sums.row_gs), _at(sums.row_g), _at(sums.col_g)


class CompiledTiles:
    """The tile functions of csrc/cpu. Tensors are float32 or float64, contiguous, on the CPU."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def _tile(self, tile: Tile) -> Any:
        double = tile.s.dtype == torch.float64
        make = self._extension.TileF64 if double else self._extension.TileF32
        s, rows, cols, pairs = tile.s, tile.rows, tile.cols, tile.pairs
        return make(
            s=s.data_ptr(),
            rows=s.shape[0],
            cols=s.shape[1],
            ld=s.stride(0),
            scale=rows.scale.data_ptr(),
            scale_stride=int(rows.scale.numel() > 1),
            row_bias=_at(rows.bias),
            row_bias_stride=int(rows.bias is not None and rows.bias.numel() > 1),
            col_bias=_at(cols.bias),
            row_ids=_at(rows.ids),
            col_ids=_at(cols.ids),
            diagonal=tile.diagonal,
            diagonal_s=0 if pairs is None else pairs.s.data_ptr(),
            diagonal_l=0 if pairs is None else pairs.logits.data_ptr(),
        )

    def softmax_statistics(self, tile: Tile, rows: Running | None, cols: Running | None) -> None:
        """Adds the tile to the running logsumexps of its rows, its columns, or both."""
        threads = torch.get_num_threads()
        self._extension.softmax_statistics(self._tile(tile), *_line(rows), *_line(cols), threads)

    def softmax_gradient(
        self, tile: Tile, rows: Side | None, cols: Side | None, sums: Sums
    ) -> None:
        """s <- scale_i G_ij."""
        lines = (*_line(rows), *_line(cols), *_sums(sums))
        self._extension.softmax_gradient(self._tile(tile), *lines, torch.get_num_threads())

    def softmax_online(self, tile: Tile, rows: Running, row_es: Tensor, rescale: Tensor) -> None:
        """s <- e^(l - new max); rescale <- e^(old max - new max); row_es accumulates sum_j p s."""
        lines = (*_line(rows), _at(row_es), _at(rescale))
        self._extension.softmax_online(self._tile(tile), *lines, torch.get_num_threads())

    def sigmoid(
        self,
        tile: Tile,
        row_loss: Tensor | None,
        row_weight: Tensor | None,
        gradient: bool,
        sums: Sums,
    ) -> None:
        """row_loss_i += sum_j softplus(l_ij); with `gradient`, s <- scale_i weight_i sigmoid(l)."""
        lines = (_at(row_loss), _at(row_weight), gradient, *_sums(sums))
        self._extension.sigmoid(self._tile(tile), *lines, torch.get_num_threads())


class CpuBackend(StreamedPrimitives):
    """Compiled tile kernels between PyTorch's matrix products."""

    made_for: tuple[str, ...] = ("cpu",)

    def __init__(self) -> None:
        super().__init__(CompiledTiles(_extension))

    def products(self, stream: Stream) -> Products:
        """On AMX for bfloat16 where the processor has it, else PyTorch's in float32 or float64."""
        extension = _extension
        if stream.u.dtype == torch.bfloat16 and extension and extension.amx_available():
            return AmxProducts(extension)
        return super().products(stream)

    def unavailable(self, device: torch.device) -> str | None:
        """Needs a CPU tensor and the compiled extension."""
        if device.type != "cpu":
            return f"the tensors are on {device}, and it works on the CPU only"
        return missing_extension()
