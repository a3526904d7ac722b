"""A case's own bare GEMMs: the products of fastcl's walk over tiles, and nothing else.

The walk is not imitated. The loss runs once with its backend's `products` wrapped, which notes
every matrix product: which operands, which tile, which part of which gradient. The replay then
makes the same products, through the same code and on the same shapes, into gradient buffers that
it allocates anew. Chunks of embeddings are prepared beforehand: widening or packing them again for
every row of tiles is the loss's cost, not the GEMMs'. (AMX products round and pack a tile of G as
part of the product, as a BLAS packs its operands; that stays in.) So the plan, the tile shapes and
the dtype of the products are whatever fastcl uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import BOTH, Case, Phase
from benchmarks.eager import LossFunction
from benchmarks.inputs import Inputs, torch_dtype
from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Stream
from fastcl.kernels.walk import Products, Total

_Buffers = dict[int, Tensor]


class NoProducts(Exception):
    """The backend makes its products where they cannot be seen."""


@dataclass(frozen=True)
class _Part:
    """A view of a gradient buffer before a product, to be taken again of a fresh one."""

    buffer: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    empty: bool

    def of(self, buffers: _Buffers) -> Total:
        part = buffers[self.buffer].as_strided(self.size, self.stride, self.offset)
        return Total(part, self.empty)


@dataclass
class Replay:
    """The noted products; calling it makes them again and returns the gradient buffers."""

    dim: int
    device: torch.device
    tiles: set[tuple[int, int]] = field(default_factory=set)
    flops: int = 0
    count: int = 0
    operand_dtype: str = ""
    _steps: list[Callable[[_Buffers], None]] = field(default_factory=list)
    _buffers: dict[int, tuple[int, torch.dtype]] = field(default_factory=dict)
    _scratch: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _keep: list[Tensor] = field(default_factory=list)  # while noting: no address is used twice

    @torch.no_grad()
    def __call__(self) -> _Buffers:
        buffers = {
            key: torch.empty(numbers, dtype=dtype, device=self.device)
            for key, (numbers, dtype) in self._buffers.items()
        }
        for step in self._steps:
            step(buffers)
        return buffers

    def part(self, total: Total | None) -> _Part | None:
        """Where `total` lies in its buffer, and whether it is still empty."""
        if total is None:
            return None
        out = total.sum
        storage = out.untyped_storage()
        key = storage.data_ptr()
        self._keep.append(out)
        self._buffers[key] = (storage.nbytes() // out.element_size(), out.dtype)
        return _Part(key, tuple(out.shape), out.stride(), int(out.storage_offset()), total.empty)

    def scratch(self, like: Tensor, *shape: int) -> Tensor:
        """Random numbers in place of what kernels keep to themselves, the same for every tile."""
        if shape not in self._scratch:
            self._scratch[shape] = torch.randn(shape, device=like.device).to(like.dtype)
        return self._scratch[shape]

    def note(self, tile: Tensor, products: int, step: Callable[[_Buffers], None]) -> None:
        """Products over a tile, 2 * rows * cols * D FLOP each."""
        self.flops += products * 2 * tile.numel() * self.dim
        self.count += products
        self.tiles.add((tile.shape[-2], tile.shape[-1]))
        self._steps.append(step)

    def done(self) -> None:
        """Lets go of the gradients that were made while noting."""
        self._keep.clear()


class _Noted:
    """A backend's products, which also notes them in a replay."""

    def __init__(self, make: Callable[[], Products], replay: Replay) -> None:
        self.make, self.products, self.replay = make, make(), replay
        self.operands: dict[tuple[str, int, tuple[int, ...]], tuple[Tensor, Any]] = {}

    def _operand(self, side: str, chunk: Tensor) -> Any:
        """The chunk prepared once, by products of its own: an operand's buffer is used again."""
        key = (side, chunk.data_ptr(), tuple(chunk.shape))
        if key not in self.operands:
            made: Any = getattr(self.make(), side)(chunk)
            self.operands[key] = (chunk, made)
            dtype = made.dtype if isinstance(made, Tensor) else chunk.dtype
            self.replay.operand_dtype = str(dtype).removeprefix("torch.")
        return self.operands[key][1]

    def __getattr__(self, name: str) -> Any:  # what makes no product passes through
        return getattr(self.products, name)

    def rows(self, chunk: Tensor) -> Any:
        return self._operand("rows", chunk)

    def cols(self, chunk: Tensor) -> Any:
        return self._operand("cols", chunk)

    def similarity(self, a: Any, b: Any, out: Tensor) -> None:
        self.products.similarity(a, b, out)
        self.replay.note(out, 1, lambda _: self.products.similarity(a, b, out))

    def fused(self, a: Any, b: Any) -> None:
        """A product that a kernel makes within itself; bare, it is the library's of the same."""
        out = self.replay.scratch(a.chunk, len(a.chunk), len(b.chunk))
        self.replay.note(out, 1, lambda _: _multiply(a.chunk, b.chunk.T, out))

    def gradients(self, g: Any, a: Any, b: Any, da: Total | None, db: Total | None) -> None:
        of_a, of_b = self.replay.part(da), self.replay.part(db)
        self.products.gradients(g, a, b, da, db)
        if not isinstance(g, Tensor):  # made and multiplied within kernels
            g = self.replay.scratch(a.chunk, *g.shape)

        def again(buffers: _Buffers) -> None:
            fresh = (None if part is None else part.of(buffers) for part in (of_a, of_b))
            self.products.gradients(g, a, b, *fresh)

        self.replay.note(g, (da is not None) + (db is not None), again)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


@contextmanager
def _noting(backend: str, replay: Replay) -> Iterator[None]:
    table: Any = dispatch.get(backend) if backend != dispatch.REFERENCE else None
    if not hasattr(table, "products"):
        raise NoProducts(f"backend {backend} makes its products inside its own kernels")
    original = table.products

    def noted(stream: Stream) -> _Noted:
        return _Noted(lambda: original(stream), replay)

    with mock.patch.object(table, "products", noted):
        yield


def record(
    case: Case, function: LossFunction, backend: str, inputs: Inputs, phase: Phase = BOTH
) -> Replay:
    """Runs fastcl's loss once on `inputs` and returns its products, ready to be made again.

    Raises:
        NoProducts: where the backend has no `products` that can be wrapped.
    """
    device = inputs.arguments()[0].device
    replay = Replay(case.d, device)
    with _noting(backend, replay), torch.set_grad_enabled(phase == BOTH):
        loss = function(*inputs.arguments())
        if phase == BOTH:
            loss.backward()  # type: ignore[no-untyped-call]
    inputs.clear_gradients()
    replay.done()
    if not replay.count:
        raise NoProducts(f"backend {backend} made no products")
    return replay


def square_rate(
    dtype: str, size: int, device: torch.device, clock: Callable[[Callable[[], Any]], float]
) -> float:
    """The machine's measured GEMM rate in TFLOP/s: the best of five size-cube products."""
    a, b = (torch.randn(size, size, device=device).to(torch_dtype(dtype)) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    seconds = min(clock(lambda: torch.mm(a, b, out=out)) for _ in range(5))
    return 2 * size**3 / seconds / 1e12
