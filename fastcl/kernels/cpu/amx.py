"""bfloat16 matrix products with float32 accumulators, on AMX (csrc/cpu/amx.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.kernels.plan import TilePlan
from fastcl.kernels.walk import Total


class _Operand:
    """A chunk of embeddings, packed into a form when a product first asks for it."""

    def __init__(self, chunk: Tensor, products: AmxProducts, name: str) -> None:
        # Rows must be contiguous, not the matrix; an expanded or transposed chunk is copied.
        self.chunk = chunk if chunk.stride(1) == 1 else chunk.contiguous()
        self._products, self._name = products, name
        self._packed: dict[str, int] = {}

    @property
    def rows(self) -> int:
        return self.chunk.shape[0]

    @property
    def dim(self) -> int:
        return self.chunk.shape[1]

    def packed(self, form: str) -> int:
        """The address of the chunk in that form (see csrc/cpu/amx.h)."""
        if form not in self._packed:
            products, x = self._products, self.chunk
            lines, k = (self.dim, self.rows) if form == "right" else (self.rows, self.dim)
            buffer = products.buffer(f"{self._name}/{form}", lines, k)
            form_of = getattr(products.extension.AmxForm, form)
            threads = torch.get_num_threads()
            products.extension.amx_pack(
                x.data_ptr(), self.rows, self.dim, x.stride(0), form_of, buffer.data_ptr(), threads
            )
            self._packed[form] = buffer.data_ptr()
        return self._packed[form]


class AmxProducts:
    """The products of a walk for bfloat16, every sum in float32.

    G enters as two bfloat16 matrices, its rounding and what that left: one alone would err by 2^-9
    in the same direction wherever probabilities are alike, more than eager PyTorch at its worst.
    That makes five products of what float32 does in three, at some six times its speed.

    The packed forms of one chunk of rows, one of columns and one tile live in buffers that are
    made once for each walk.
    """

    narrow = False

    def parts(self, plan: TilePlan) -> int:
        """Two: see above."""
        return 2

    def __init__(self, extension: Any) -> None:
        self.extension = extension
        self._buffers: dict[str, Tensor] = {}

    def storage(self, dim: int) -> tuple[int, int]:
        """A tile, G split and packed twice; a chunk packed twice, the rows' float32 gradient."""
        return 4 + 4 + 4, (2 + 2 + 4) * dim

    def buffer(self, name: str, lines: int, k: int, copies: int = 1) -> Tensor:
        """Storage for packed matrices, aligned as PyTorch aligns (64 bytes)."""
        size = copies * self.extension.amx_packed_bytes(lines, k)
        found = self._buffers.get(name)
        if found is None or found.numel() < size:
            found = self._buffers[name] = torch.empty(size, dtype=torch.uint8)
        return found

    def rows(self, chunk: Tensor) -> _Operand:
        """A chunk of u."""
        return _Operand(chunk, self, "rows")

    def cols(self, chunk: Tensor) -> _Operand:
        """A chunk of the keys."""
        return _Operand(chunk, self, "cols")

    def similarity(self, a: _Operand, b: _Operand, out: Tensor) -> None:
        """out = a b^T."""
        left, right = a.packed("left"), b.packed("right_of_transpose")
        self._multiply(left, right, a.dim, out, accumulate=False)

    def gradients(
        self, g: Tensor, a: _Operand, b: _Operand, da: Total | None, db: Total | None
    ) -> None:
        """da += g b and db += g^T a, each where it is wanted."""
        if da is None and db is None:
            return
        r, c = g.shape
        left = 0 if da is None else self.buffer("g", r, c, copies=2).data_ptr()
        left_of_transpose = 0 if db is None else self.buffer("g^T", c, r, copies=2).data_ptr()
        self.extension.amx_pack_split(
            g.data_ptr(), r, c, g.stride(0), left, left_of_transpose, torch.get_num_threads()
        )
        if da is not None:
            self._add_split(left, (r, c), b.packed("right"), da)
        if db is not None:
            self._add_split(left_of_transpose, (c, r), a.packed("right"), db)

    def _add_split(self, left: int, shape: tuple[int, int], right: int, total: Total) -> None:
        """total += left right for a left matrix of that shape, packed in two parts."""
        for part in (left, left + self.extension.amx_packed_bytes(*shape)):
            self._multiply(part, right, shape[1], total.sum, accumulate=not total.begin())

    def _multiply(self, left: int, right: int, k: int, out: Tensor, *, accumulate: bool) -> None:
        m, n = out.shape
        threads = torch.get_num_threads()
        self.extension.amx_multiply(
            left, right, m, n, k, out.data_ptr(), out.stride(0), accumulate, threads
        )
