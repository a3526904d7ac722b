"""The Triton backend: fused tiles, chunked for a GPU's matrix products."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.kernels.dispatch import Stream
from fastcl.kernels.plan import Chunk, TilePlan
from fastcl.kernels.streamed import StreamedPrimitives
from fastcl.kernels.tiles import ColTerms, Pairs, RowTerms, Tile, TileKernels
from fastcl.kernels.triton.plan import (
    ALIGNMENT,
    blocks_for,
    by_library,
    owned,
    parts_of_gradient,
    plan_chunks,
    plan_owned,
    plan_symmetric_chunks,
)
from fastcl.kernels.triton.support import architecture, installed, interpreted, processors
from fastcl.kernels.walk import TileMaker, Total, add_product

if TYPE_CHECKING:
    from fastcl.kernels.triton.launch_owner import OwnedGradient


class Operand(NamedTuple):
    """A chunk of embeddings, as they are and padded with zeros to aligned rows."""

    chunk: Tensor
    padded: Tensor


class GpuProducts:
    """The products that no kernel makes, in the inputs' dtype with float32 accumulators.

    Those are a gradient's; where owners make it, this only says where to; and similarities of few
    blocks with long rows.
    """

    narrow = True

    def parts(self, plan: TilePlan) -> int:
        """Two for few pairs of 16 bits."""
        return parts_of_gradient(plan, self._itemsize)

    def __init__(self, dtype: torch.dtype) -> None:
        self._itemsize = dtype.itemsize

    def rows(self, chunk: Tensor) -> Operand:
        """A chunk of u, with rows that kernels can step through."""
        chunk = chunk if chunk.stride(1) == 1 else chunk.contiguous()
        missing = -chunk.shape[1] % ALIGNMENT
        return Operand(chunk, F.pad(chunk, (0, missing)) if missing else chunk)

    cols = rows

    def similarity(self, a: Operand, b: Operand, out: Tensor) -> None:
        """out = a b^T in float32, where that is not left to a kernel."""
        x, y = a.chunk, b.chunk.T
        if x.dtype == torch.float32:
            torch.mm(x, y, out=out)
        elif x.is_cuda:
            out.copy_(torch.mm(x, y, out_dtype=torch.float32))
        else:
            torch.mm(x.float(), y.float(), out=out)

    def fused(self, a: Operand, b: Operand) -> None:
        """A kernel multiplies these itself: nothing to do, but benchmarks count it."""

    def gradients(
        self, g: Tensor | OwnedGradient, a: Operand, b: Operand, da: Total | None, db: Total | None
    ) -> None:
        """da += g b and db += g^T a, each where it is wanted."""
        if not isinstance(g, Tensor):
            g.into(da, db)
            return
        for part in g:
            if da is not None:
                _add_product(da, part, b.chunk)
            if db is not None:
                _add_product(db, part.T, a.chunk)


def _add_product(total: Total, x: Tensor, y: Tensor) -> None:
    """total += x y, in float32 throughout."""
    if x.dtype == torch.float32:
        add_product(total, x, y)
    elif x.is_cuda:
        add_product(total, x, y, out_dtype=torch.float32)
    else:  # interpreted: PyTorch's CPU product would round its result to 16 bits
        add_product(total, x.float(), y.float())


class FusedTileMaker(TileMaker):
    """Hands out tiles that are not made yet, with room for their gradient."""

    products: GpuProducts  # type: ignore[assignment]

    def allocate(self) -> None:
        """Storage for kept similarities and for G; ids as they are."""
        stream, plan, u = self.stream, self.plan, self.stream.u
        self.storage = u.new_empty(plan.workspace if plan.keep else 0, dtype=torch.float32)
        self.parts = self.products.parts(plan)
        tile = 0 if plan.owned else min(plan.rows, plan.n) * min(plan.cols, plan.m)
        self.room = u.new_empty(self.parts * tile)
        self.row_terms = RowTerms(stream.scale, stream.row_bias, stream.row_ids)
        self.col_terms = ColTerms(stream.col_bias, stream.col_ids)

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
        """The tile of these chunks; `made`: its similarities are in the storage of the plan."""
        from fastcl.kernels.triton.launch import FusedTile

        size, keep = rows.size * cols.size, self.plan.keep
        room = (0, 0) if self.plan.owned else (rows.size, cols.size)
        start = rows.size * cols.start if keep else 0
        s = self.storage[start : start + size] if keep else self.storage
        if not made and self._by_library(rows.size, cols.size, a.padded):
            s = s if keep else s.new_empty(size)
            self.products.similarity(a, b, s.view(rows.size, cols.size))
            made = True
        described = self.described(rows, cols, pairs)
        return FusedTile(
            s=s,
            **described,
            u=a.padded,
            v=b.padded,
            unit=self.unit,
            room=self.room[: self.parts * room[0] * room[1]].view(self.parts, *room),
            keep=keep,
            made=made,
            owned=self.plan.owned,
            multiplied=functools.partial(self.products.fused, a, b),
            spare=self.stream.workspace // 2,
        )

    def _by_library(self, rows: int, cols: int, x: Tensor) -> bool:
        if self.plan.owned:
            return False
        known = 90 if interpreted() else architecture(x.device)
        blocks = blocks_for(x.element_size(), x.shape[1], known, split=self.parts == 2)
        return by_library(rows, cols, x.shape[1], blocks, processors(x.device))


class TritonBackend(StreamedPrimitives):
    """Triton kernels between the embeddings and G, and for small ones up to their gradients."""

    made_for: tuple[str, ...] = ("cuda",)

    def __init__(self) -> None:
        self._tiles: TileKernels | None = None

    @property
    def kernels(self) -> TileKernels:  # type: ignore[override]
        """The tile functions; Triton is imported when they are first wanted."""
        if self._tiles is None:
            from fastcl.kernels.triton.launch import TritonTiles

            self._tiles = TritonTiles()
        return self._tiles

    def products(self, stream: Stream) -> Any:
        """cuBLAS in the inputs' dtype; for float64 PyTorch's products over ordinary tiles."""
        return (
            super().products(stream)
            if stream.u.dtype == torch.float64
            else GpuProducts(stream.u.dtype)
        )

    def plan(self, stream: Stream, *, keep: bool = False) -> TilePlan:
        """How the stream is cut into chunks."""
        u, keys = stream.u, stream.keys
        if u.dtype == torch.float64:
            return super().plan(stream, keep=keep)
        if owned(u.shape[1], u.element_size()) and torch.version.hip is None:  # AMD: not tried
            return plan_owned(len(u), len(keys), u.shape[1], stream.workspace)
        if stream.v is None:
            return plan_symmetric_chunks(len(u), u.element_size(), stream.workspace)
        n, m, dim = len(u), len(keys), u.shape[1]
        return plan_chunks(n, m, dim, u.element_size(), stream.workspace, keep=keep)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows divided by their L2 norm, the norms), in one launch."""
        if x.dtype == torch.float64:
            return super().normalize(x)
        from fastcl.kernels.triton.normalize import normalize

        return normalize(x)

    def normalize_backward(self, grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
        """The gradient of x, given that of its normalised rows, in one launch."""
        if x.dtype == torch.float64:
            return super().normalize_backward(grad, x, norm)
        from fastcl.kernels.triton.normalize import normalize_backward

        return normalize_backward(grad, x, norm)

    def _maker(self, stream: Stream, *, keep: bool = False) -> TileMaker:
        make = TileMaker if stream.u.dtype == torch.float64 else FusedTileMaker
        return make(stream, self.plan(stream, keep=keep), self.products(stream))

    def unavailable(self, device: torch.device) -> str | None:
        """Needs Triton and a CUDA or ROCm device; in Triton's interpreter, a CPU tensor."""
        if not installed():
            return "Triton is not installed; pip install 'fastcl[gpu]' brings it"
        if interpreted():
            return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs on the CPU only"
        if device.type != "cuda":
            return f"the tensors are on {device}, and it works on CUDA and ROCm devices only"
        return None
