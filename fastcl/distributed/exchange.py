"""How the other tower's rows come to each rank, and how their gradients go home.

A rank computes blocks of the similarity matrix: its rows against rows of other ranks. Forward and
backward ask for the same blocks; in the backward each block's gradient is given back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastcl.distributed.collectives import (
    Transfer,
    gather_rows,
    pass_on,
    sum_to_owners,
    wire_dtype,
)
from fastcl.distributed.ranks import Ranks


@dataclass(frozen=True)
class Segment:
    """Rows of one rank."""

    rank: int
    rows: slice

    @property
    def size(self) -> int:
        """How many."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Block:
    """This rank's `rows` against `keys`, which are the `cols` segments in order.

    `diagonal`: the column of row 0's own partner, in the block that has it. `symmetric`: the keys
    are the rows themselves.
    """

    rows: slice
    keys: Tensor
    cols: tuple[Segment, ...]
    diagonal: int | None = None
    symmetric: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.rows.stop == self.rows.start or len(self.keys) == 0


class Exchange(Protocol):
    """Brings blocks.

    `kept`: what it holds of other ranks' rows between forward and backward. Autograd keeps that
    with what else it saves, and frees it with that.
    """

    kept: tuple[Tensor, ...]

    def blocks(self, own: Tensor) -> Iterator[Block]:
        """The blocks of this rank, given its own rows of the other tower."""

    def give(self, block: Block, gradient: Tensor) -> None:
        """The gradient of the keys of a block that was just handed out, as accumulated.

        (Not of a symmetric block: its keys' gradient is its rows'.)
        """

    def collect(self, out: Tensor | None = None) -> Tensor:
        """The sum over ranks of the gradients of this rank's own rows, added to `out`."""


def exchange_of(ranks: Ranks, symmetric: bool) -> Exchange:
    """The exchange for the mode that was agreed on."""
    if ranks.mode == "ring":
        return Ring(ranks, symmetric)
    return Direct(ranks) if symmetric else AllGather(ranks)


class AllGather:
    """All rows at once, as one block; kept for the backward."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.kept: tuple[Tensor, ...] = ()
        self._sum: Tensor | None = None

    def blocks(self, own: Tensor) -> Iterator[Block]:
        """One block, of everyone's rows."""
        ranks = self._ranks
        self.kept = self.kept or (gather_rows(own.detach(), ranks),)
        cols = tuple(Segment(s, slice(0, n)) for s, n in enumerate(ranks.counts))
        rows = slice(0, ranks.counts[ranks.rank])
        yield Block(rows, self.kept[0], cols, diagonal=ranks.offset)

    def give(self, block: Block, gradient: Tensor) -> None:
        """Sums over ranks at once."""
        self._sum = sum_to_owners(gradient, self._ranks)

    def collect(self, out: Tensor | None = None) -> Tensor:
        """What `give` summed."""
        assert self._sum is not None
        assert out is None
        out, self._sum = self._sum, None
        return out


# ---- v = u: the matrix over all rows is symmetric, and each pair of ranks has one block ----


def partner(counts: Sequence[int], row_rank: int, distance: int) -> tuple[slice, Segment]:
    """What a rank computes with the one `distance` further: its rows, and the other's.

    Up to half way round each pair of ranks meets once. At half way it meets twice, and each of the
    two takes half of the rows of the one that comes first.
    """
    other = (row_rank + distance) % len(counts)
    n, m = counts[row_rank], counts[other]
    if distance == 0 or 2 * distance < len(counts):
        return slice(0, n), Segment(other, slice(0, m))
    if row_rank < other:
        return slice(0, n // 2), Segment(other, slice(0, m))
    return slice(0, n), Segment(other, slice(m // 2, m))


class Direct:
    """Half of the other ranks' rows, straight from each; kept for the backward."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._hops = range(1, ranks.size // 2 + 1)
        self.kept: tuple[Tensor, ...] = ()
        self._given: list[Tensor] = []

    def blocks(self, own: Tensor) -> Iterator[Block]:
        """This rank's own block, while the others are on their way, and then those."""
        ranks, own = self._ranks, own.detach()
        transfers = [] if self.kept else [self._fetch(own, d) for d in self._hops]
        rows, mine = partner(ranks.counts, ranks.rank, 0)
        yield Block(rows, own, (mine,), symmetric=True)
        self.kept = self.kept or tuple(transfer.wait() for transfer in transfers)
        for distance, keys in zip(self._hops, self.kept, strict=True):
            rows, segment = partner(ranks.counts, ranks.rank, distance)
            yield Block(rows, keys, (segment,))

    def _fetch(self, own: Tensor, distance: int) -> Transfer:
        ranks, before = self._ranks, (self._ranks.rank - distance) % self._ranks.size
        _, wanted = partner(ranks.counts, ranks.rank, distance)
        _, asked = partner(ranks.counts, before, distance)
        room = own.new_empty(wanted.size, *own.shape[1:])
        return pass_on(own[asked.rows], before, room, wanted.rank, ranks)

    def give(self, block: Block, gradient: Tensor) -> None:
        """Keeps it until all are there."""
        self._given.append(gradient)

    def collect(self, out: Tensor | None = None) -> Tensor:
        """Each block's gradient goes straight home."""
        ranks = self._ranks
        assert out is not None
        transfers = []
        for distance, gradient in zip(self._hops, self._given, strict=True):
            segment = partner(ranks.counts, ranks.rank, distance)[1]
            before = (ranks.rank - distance) % ranks.size
            mine = partner(ranks.counts, before, distance)[1]
            wire = gradient.to(wire_dtype(gradient.dtype, ranks))
            room = wire.new_empty(mine.size, *out.shape[1:])
            transfers.append((mine, pass_on(wire, segment.rank, room, before, ranks)))
        for mine, transfer in transfers:
            out[mine.rows] += transfer.wait()
        self._given = []
        return out


class Ring:
    """One rank's rows at a time, from neighbour to neighbour, while the ones before are worked on.

    In step k this rank r has the rows of rank r + k. Beside its own it holds two blocks: the one it
    works on, and the one that is coming. The gradients of a block go along the ring behind it, each
    rank adding its own, and from the last one home. Self-similarities need half the way round.
    """

    def __init__(self, ranks: Ranks, symmetric: bool) -> None:
        self._ranks, self._symmetric = ranks, symmetric
        self._last = ranks.size // 2 if symmetric else ranks.size - 1
        self.kept: tuple[Tensor, ...] = ()  # nothing: blocks come again
        self._own: Tensor | None = None
        self._step = 0
        self._coming: Transfer | None = None  # the sum of the next block's gradients so far

    def blocks(self, own: Tensor) -> Iterator[Block]:
        """This rank's own block, its neighbour's, and so on."""
        ranks, held = self._ranks, own.detach().contiguous()
        most = max(ranks.counts)
        rooms = [own.new_empty(most, *own.shape[1:]) for _ in range(min(2, self._last))]
        left, right = (ranks.rank - 1) % ranks.size, (ranks.rank + 1) % ranks.size
        for k in range(self._last + 1):
            coming = None
            if k < self._last:
                room = rooms[k % 2][: ranks.counts[(ranks.rank + k + 1) % ranks.size]]
                coming = pass_on(held, left, room, right, ranks)
            self._step = k
            yield self._block(k, held)
            if coming is not None:
                held = coming.wait()

    def _block(self, k: int, held: Tensor) -> Block:
        ranks = self._ranks
        if not self._symmetric:
            here = (ranks.rank + k) % ranks.size
            rows = slice(0, ranks.counts[ranks.rank])
            cols = (Segment(here, slice(0, len(held))),)
            return Block(rows, held, cols, diagonal=0 if k == 0 else None)
        rows, segment = partner(ranks.counts, ranks.rank, k)
        return Block(rows, held[segment.rows], (segment,), symmetric=k == 0)

    def give(self, block: Block, gradient: Tensor) -> None:
        """Adds what has come along the ring so far, and sends it on."""
        if self._step == 0:
            self._own = gradient
            return
        ranks, k = self._ranks, self._step
        (segment,) = block.cols
        if segment.size < ranks.counts[segment.rank]:  # half of a rank's rows
            whole = gradient.new_zeros(ranks.counts[segment.rank], *gradient.shape[1:])
            whole[segment.rows] = gradient
            gradient = whole
        if self._coming is not None:
            gradient += self._coming.wait()
        wire = gradient.to(wire_dtype(gradient.dtype, ranks))
        if k < self._last:
            to, origin = ranks.rank - 1, ranks.rank + 1
            rows = ranks.counts[(ranks.rank + k + 1) % ranks.size]
        else:
            to, origin = ranks.rank + k, ranks.rank - k
            rows = ranks.counts[ranks.rank]
        room = wire.new_empty(rows, *wire.shape[1:])
        self._coming = pass_on(wire, to % ranks.size, room, origin % ranks.size, ranks)

    def collect(self, out: Tensor | None = None) -> Tensor:
        """This rank's own rows' gradient from its own block, and what came home."""
        out = self._own if out is None else out
        assert out is not None
        if self._coming is not None:
            out += self._coming.wait()
        self._own = self._coming = None
        return out
