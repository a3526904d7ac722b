"""What a loss across ranks costs a rank: formulas, held against the counts of traffic.py.

`Cost` is exact (tests/benchmarks/test_distributed.py); `Machine` and `Step`, which turn it into
seconds, are a model, not measured. docs/scaling.md says what it assumes.

n rows of each of two towers on each of W ranks (equal batches), N = W n; D numbers of b bytes each,
whose gradients are sent in w bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastcl.distributed.cost import exchange_cost
from fastcl.distributed.exchange import partner
from fastcl.kernels.plan import plan_symmetric

LOSSES = ("clip", "siglip", "nt_xent", "info_nce")
MODES = ("gather", "ring")
TWO_SIDED = "two-sided"  # open_clip's ClipLoss(local_loss=True, gather_with_grad=True)
_OF_BYTES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
WORKSPACE = 256 << 20  # bytes: the default


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends. `embeddings` and their `gradients`; the rest is O(N) numbers."""

    embeddings: int
    gradients: int
    statistics: int
    header: int

    @property
    def towers(self) -> int:
        """What grows with D."""
        return self.embeddings + self.gradients

    @property
    def total(self) -> int:
        """All of it."""
        return self.towers + self.statistics + self.header


@dataclass(frozen=True)
class Block:
    """A rank's rows against keys; `symmetric`: against themselves."""

    rows: int
    keys: int
    symmetric: bool = False


@dataclass(frozen=True)
class Cost:
    """One loss, forward and backward, as rank `rank` of `ranks` computes it.

    `rows`: n; `dim`: D; `itemsize`: b; `wire`: w. `keep`: rows that must fit the workspace, against
    all columns in float32, for a one-directional loss to keep its tiles (256 on a CPU).
    """

    loss: str
    mode: str
    ranks: int
    rows: int
    dim: int
    itemsize: int
    wire: int
    rank: int = 0
    keep: int = 256

    @property
    def embeddings(self) -> int:
        """Rows of the matrix that lie on a rank: both views of a sample count with NT-Xent."""
        return 2 * self.rows if self.loss == "nt_xent" else self.rows

    @property
    def hops(self) -> int:
        """Blocks beside a rank's own: half-way round where the matrix is symmetric."""
        return self.ranks // 2 if self.loss == "nt_xent" else self.ranks - 1

    def blocks(self) -> Iterator[Block]:
        """What the rank computes, its own block first."""
        n = self.embeddings
        yield Block(n, n, symmetric=self.loss == "nt_xent")
        for hop in range(1, self.hops + 1):
            yield self._pair(self.rank, hop)

    def _pair(self, rank: int, hop: int) -> Block:
        """With the rank so much further; at half way (of an even W) two ranks share one block."""
        n = self.embeddings
        if self.loss != "nt_xent":
            return Block(n, n)
        rows, keys = partner((n,) * self.ranks, rank, hop)
        return Block(rows.stop - rows.start, keys.size)

    # ---- arithmetic, in entries of the matrix; each product over one is 2 D FLOP ----

    @property
    def entries(self) -> int:
        """The rank's part of the matrix of similarities, each made once."""
        return sum(self._made(block) for block in self.blocks())

    @property
    def similarities(self) -> int:
        """Entries as often as they are made."""
        return self.entries * (1 if self._from_one_pass else 2)

    @property
    def flops(self) -> int:
        """Of all products: similarities, and two gradients of each entry."""
        if self.mode == TWO_SIDED:
            return 2 * self.dim * 6 * self.entries
        gradients = sum(self._gradients(block) for block in self.blocks())
        return 2 * self.dim * (self.similarities + gradients)

    @property
    def _from_one_pass(self) -> bool:
        """Whether the gradient is made in the forward, of tiles that are still there."""
        if self.mode != "gather" or self.loss not in ("siglip", "info_nce"):
            return False
        fits = min(self.rows, self.keep) * self.ranks * self.rows * 4 <= WORKSPACE
        return self.loss == "siglip" or fits

    @staticmethod
    def _made(block: Block) -> int:
        """Of a symmetric block the tiles on and above the diagonal."""
        if not block.symmetric:
            return block.rows * block.keys
        sizes = [chunk.size for chunk in plan_symmetric(block.rows, 4, WORKSPACE).row_chunks()]
        return sum(a * b for i, a in enumerate(sizes) for b in sizes[i:])

    @staticmethod
    def _gradients(block: Block) -> int:
        """Entries times products: a symmetric block's tiles on the diagonal give one product."""
        return block.rows * block.keys * (1 if block.symmetric else 2)

    # ---- bytes ----

    @property
    def sent(self) -> Sent:
        """What the rank sends."""
        others, n = self.ranks - 1, self.embeddings
        if self.mode == TWO_SIDED:
            one = others * n * self.dim * self.itemsize
            return Sent(2 * one, 2 * one, 0, 0)
        cost = exchange_cost(
            n,
            self.ranks,
            self.dim,
            _OF_BYTES[self.itemsize],
            mode=self.mode,
            symmetric=self.loss == "nt_xent",
            columns=self.loss in ("clip", "nt_xent"),
            reduce_dtype=_OF_BYTES[self.wire],
            rank=self.rank,
        )
        return Sent(cost.embeddings, cost.gradients, cost.statistics, cost.header)
