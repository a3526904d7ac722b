"""From what a rank sends and multiplies to seconds and bytes on a cluster: a model, not measured.

docs/scaling.md states the assumptions and shows the table; `python -m benchmarks.scaling model`
prints it. What is counted (bytes, FLOP) comes from cost_model.py, which tests hold to the counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.cost_model import WORKSPACE, Cost
from benchmarks.reports import markdown
from fastcl.distributed.ranks import choose_mode
from fastcl.kernels.triton.plan import CHUNK

LOSSES = ("clip", "siglip")  # whose memory has a formula here
GPUS = (8, 64, 1024)
BATCHES = {"32k": 1 << 15, "1M": 1 << 20, "16M": 1 << 24}
DIM = 768
BFLOAT16, FLOAT32 = 2, 4
ARITHMETIC, LINK, MEMORY = "arithmetic", "link", "memory"


@dataclass(frozen=True)
class Machine:
    """Assumed of a cluster of H200: what is achieved, not what is printed on the box."""

    flops: float = 700e12  # bfloat16 products with float32 accumulators
    memory_rate: float = 4e12  # bytes/s to and from a GPU's memory
    memory: float = 141e9  # bytes of it
    node: int = 8  # GPUs
    nvlink: float = 450e9  # bytes/s of one GPU, each way, within a node
    network: float = 50e9  # bytes/s of one GPU's network card
    latency: float = 10e-6  # of a message


@dataclass(frozen=True)
class Step:
    """One loss, forward and backward, on one GPU of many."""

    cost: Cost
    machine: Machine = Machine()

    # ---- compute ----

    @property
    def arithmetic(self) -> float:
        """Seconds of products."""
        return self.cost.flops / self.machine.flops

    @property
    def memory(self) -> float:
        """Seconds of reading embeddings, and of G and the sums, by chunks as Triton's plan has."""
        cost, blocks = self.cost, self.cost.ranks if self.cost.mode == "ring" else 1
        n, m, d = cost.rows, cost.rows * cost.ranks // blocks, cost.dim
        reads = 1 if self._one_pass else 2
        moved = reads * (n + m) * d * cost.itemsize
        moved += 3 * cost.itemsize * n * m  # G is written once and read twice
        rows, cols = (min(chunk, size) for chunk, size in zip(CHUNK, (n, m), strict=True))
        moved += 2 * FLOAT32 * d * (m * math.ceil(n / rows) + n * math.ceil(m / cols))
        return blocks * moved / self.machine.memory_rate

    @property
    def _one_pass(self) -> bool:
        return self.cost.loss == "siglip" and self.cost.mode == "gather"

    @property
    def passes(self) -> tuple[float, float]:
        """Seconds of forward and backward: by their products, whose traffic overlaps them."""
        both = max(self.arithmetic, self.memory)
        return (both, 0.0) if self._one_pass else (both / 4, both * 3 / 4)

    # ---- links ----

    def collective(self, sent: float) -> float:
        """An all-gather or reduce-scatter: between nodes through all network cards of a node."""
        machine, ranks = self.machine, self.cost.ranks
        rate = machine.nvlink
        if ranks > machine.node:
            rate = min(rate, machine.node * machine.network)
        return sent / rate + machine.latency * math.log2(ranks)

    def direct(self, sent: float) -> float:
        """An all-to-all: what goes to other nodes, through a GPU's own network card."""
        machine, ranks = self.machine, self.cost.ranks
        if ranks <= machine.node:
            return sent / machine.nvlink + machine.latency
        away = (ranks - machine.node) / (ranks - 1)
        return sent * away / machine.network + machine.latency

    def neighbour(self, sent: float) -> float:
        """One step of a ring: as slow as the slowest pair, which lies in two nodes."""
        machine = self.machine
        rate = machine.nvlink if self.cost.ranks <= machine.node else machine.network
        return sent / rate + machine.latency

    @property
    def links(self) -> tuple[float, float]:
        """Seconds of transfers in the forward and in the backward."""
        sent, cost, others = self.cost.sent, self.cost, self.cost.ranks - 1
        there = self.direct(sent.statistics / 2) if sent.statistics else 0.0
        back = self.collective(sent.statistics / 2) if sent.statistics else 0.0
        if cost.mode == "gather":
            summed = self.collective if cost.wire == FLOAT32 else self.direct
            return there + self.collective(sent.embeddings), back + summed(sent.gradients)
        rows = cost.rows * cost.dim
        there += others * self.neighbour(rows * cost.itemsize)
        back += others * self.neighbour(rows * (cost.itemsize + cost.wire))
        return there, back + self.neighbour(rows * cost.wire)

    # ---- together ----

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each, as if nothing overlapped."""
        return {ARITHMETIC: self.arithmetic, MEMORY: self.memory, LINK: sum(self.links)}

    @property
    def seconds(self) -> float:
        """Gathered: transfers and products in turn. Round a ring all but one block's overlap."""
        if self.cost.mode == "gather":
            return sum(self.passes) + sum(self.links)
        blocks = self.cost.ranks
        return sum(
            made / blocks + max(made * (blocks - 1) / blocks, sent)
            for made, sent in zip(self.passes, self.links, strict=True)
        )

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])

    def held(self, *, native: bool = True, workspace: int = WORKSPACE) -> int:
        """Bytes at the peak beside the two towers: this rank's gradients in float32 included.

        `native`: sums in float32 are the library's reduce-scatter, as on NCCL; else (on gloo) an
        all-to-all of all rows, as for a narrower `reduce_dtype`.
        """
        cost = self.cost
        own, narrow = cost.rows * cost.dim, cost.wire != FLOAT32
        if cost.mode == "ring":
            # Two blocks; float32 gradients of the rows, of the own block, and of blocks that are
            # computed, come and go.
            sums = 6 if cost.loss == "siglip" else 5
            numbers = 2 * cost.itemsize + (sums + narrow) * FLOAT32 + 2 * cost.wire
            return own * numbers + workspace
        total = own * cost.ranks
        arriving = 0 if native and not narrow else (1 + narrow) * total * cost.wire
        # siglip's gradient is there from the forward on, and once more times the incoming one.
        sums = 2 if cost.loss == "siglip" else 1
        gathered = total * (cost.itemsize + sums * FLOAT32) + 2 * own * FLOAT32
        return gathered + max(workspace, arriving)


def steps(loss: str, wire: int) -> Iterator[tuple[str, Step]]:
    """The cases of the page's table: the batch's name, and the step."""
    for gpus in GPUS:
        for name, batch in BATCHES.items():
            for mode in ("gather", "ring"):
                yield name, Step(Cost(loss, mode, gpus, batch // gpus, DIM, BFLOAT16, wire))


def table(loss: str) -> str:
    """The page's table."""
    head = ("GPUs", "batch", "mode", "rows/GPU", "TFLOP", "GB sent", *(f"{x}, ms" for x in _PARTS))
    head += ("step, ms", "bfloat16 sums, ms", "bound by", "GB held")
    lines = []
    narrow = (step for _, step in steps(loss, BFLOAT16))
    for (name, step), thin in zip(steps(loss, FLOAT32), narrow, strict=True):
        cost, parts = step.cost, step.parts
        chosen = choose_mode("auto", cost.ranks * cost.rows, DIM, cost.ranks, torch.bfloat16, True)
        held = step.held() / 1e9
        lines.append(
            [
                str(cost.ranks),
                name,
                cost.mode + (" (auto)" if chosen == cost.mode else ""),
                f"{cost.rows:,}",
                _short(cost.flops / 1e12),
                _short(cost.sent.total / 1e9),
                *(_short(1e3 * parts[part]) for part in _PARTS),
                _short(1e3 * step.seconds),
                _short(1e3 * thin.seconds),
                step.bound,
                _short(held) + (", too much" if held * 1e9 > step.machine.memory else ""),
            ]
        )
    return markdown(head, lines, left=3)


_PARTS = (ARITHMETIC, MEMORY, LINK)


def _short(x: float) -> str:
    """Three digits."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.3g}" if x < 10 else f"{x:.1f}"
