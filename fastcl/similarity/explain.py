"""What a loss is going to do, before it does it: chunks, products, launches, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastcl.distributed.cost import ExchangeCost, exchange_cost
from fastcl.distributed.ranks import Mode, check_options, choose_mode
from fastcl.kernels import dispatch
from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.kernels.plan import TilePlan
from fastcl.similarity.block_cost import BlockCost, Kind, block_cost
from fastcl.similarity.inputs import check_choice, check_dtype, check_workspace

LossName = Literal["info_nce", "clip_loss", "siglip_loss", "nt_xent"]
_LOSSES = ("info_nce", "clip_loss", "siglip_loss", "nt_xent")


@dataclass(frozen=True)
class Explanation:
    """The plan of one loss, forward and backward. Printing it gives a table.

    Attributes:
        plan: rows and columns of a tile (on a GPU: a chunk, of one launch).
        tiles: how many are made in one pass over the matrix.
        passes: what is done with each tile, in order.
        products: matrix products over the whole matrix, in units of 2 N M D FLOP.
        flops: FLOP of all products.
        launches: kernel launches and library products (on a CPU: calls).
        traffic: bytes that tiles, their operands and the accumulators move to and from memory, if
            each pass over a tile finds none of them in a cache, and its own blocks do.
        workspace: bytes of tile storage; where no tile is stored, of partial sums.
        accumulators: bytes of gradients in float32 (float64) beside those that are returned.
        world_size: ranks of the group; all figures are of one of them. n and m are then the rows
            and columns of its part of the matrix.
        mode: "gather" or "ring"; None for one process.
        sent: bytes that it sends.
        held: bytes of other ranks' embeddings that it holds at a time.
    """

    loss: str
    backend: str
    dtype: torch.dtype
    n: int
    m: int
    dim: int
    plan: TilePlan
    tiles: int
    passes: tuple[str, ...]
    products: float
    flops: float
    launches: int
    traffic: int
    workspace: int
    accumulators: int
    world_size: int = 1
    mode: str | None = None
    sent: int = 0
    held: int = 0

    def __str__(self) -> str:
        plan, kept = self.plan, ", kept until their gradient is made" if self.plan.keep else ""
        rows = [
            ("loss", f"{self.loss}, {self.n} x {self.m} pairs, D = {self.dim}, {self.dtype}"),
            ("backend", self.backend),
            ("tiles", f"{self.tiles} of up to {plan.rows} x {plan.cols}{kept}"),
            ("passes", "; ".join(self.passes)),
            ("products", f"{self.products:.3g} x 2NMD = {self.flops / 1e12:.3g} TFLOP"),
            ("launches", str(self.launches)),
            ("traffic", f"{self.traffic / 1e9:.3g} GB"),
            ("workspace", f"{self.workspace / 2**20:.0f} MiB"),
            ("accumulators", f"{self.accumulators / 2**20:.0f} MiB of float32"),
        ]
        if self.mode is not None:
            rows.insert(2, ("ranks", f"{self.world_size}, mode {self.mode}: of one of them"))
            rows.append(("sent", f"{self.sent / 1e9:.3g} GB"))
            rows.append(("held", f"{self.held / 2**20:.0f} MiB of other ranks' embeddings"))
        return "\n".join(f"{name:<13} {text}" for name, text in rows)


def explain(
    loss: LossName,
    n: int,
    d: int,
    *,
    m: int | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    workspace: int | None = None,
    world_size: int = 1,
    mode: Mode | str = "auto",
    reduce_dtype: torch.dtype | None = None,
) -> Explanation:
    """How a loss's forward and backward would be computed: nothing is computed here.

    The plan is a function of these arguments alone, so that a plan for a GPU (an H200) can be read
    without one.

    Args:
        loss: "info_nce", "clip_loss", "siglip_loss" or "nt_xent", with mean or sum and gradients
            for all embeddings.
        n: rows of each tower (nt_xent: of each view); with `world_size`, of this rank.
        d: dimension of the embeddings.
        m: keys of info_nce with separate negatives; None: n.
        dtype: of the embeddings.
        backend: "cpu", "torch", "triton"; "auto": the one for CPU tensors.
        workspace: bytes that the tiles may take; None: the backend's default.
        world_size: ranks over which the batch is spread, n rows on each.
        mode: how the other tower travels between them: "gather", "ring", or "auto", which chooses
            by its size.
        reduce_dtype: in which dtype its gradients travel; None: as they are accumulated.

    Raises:
        ValueError, TypeError: for a loss, size, dtype or backend that there is not.

    Example:
        >>> import fastcl, torch
        >>> plan = fastcl.explain("clip_loss", 65536, 768, dtype=torch.bfloat16, backend="triton")
        >>> plan.products, plan.tiles
        (4.0, 48)
        >>> fastcl.explain("clip_loss", 16384, 768, dtype=torch.bfloat16, world_size=64).mode
        'ring'
        >>> print(plan)  # doctest: +ELLIPSIS
        loss          clip_loss, 65536 x 65536 pairs, D = 768, torch.bfloat16
        ...
    """
    check_choice("loss", loss, _LOSSES)
    check_dtype("loss", dtype)
    check_options(mode, reduce_dtype)
    sizes = {"n": n, "d": d, "m": n if m is None else m, "world_size": world_size}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            what = "ranks" if name == "world_size" else "rows or dimensions"
            raise ValueError(f"{name} is {size!r}; expected a positive number of {what}")
    if m is not None and (loss != "info_nce" or world_size > 1):
        what = "a batch across ranks" if loss == "info_nce" else f"{loss}, which pairs all rows"
        raise ValueError(f"m has no meaning for {what}: leave it out")
    dispatch.check_name(backend)
    if backend == dispatch.AUTO:
        backend = dispatch.resolve(backend, torch.device("cpu"))
    if backend == dispatch.REFERENCE:
        raise ValueError("the reference stores the whole matrix: there is no plan to explain")
    budget = check_workspace(workspace, dispatch.get(backend).default_workspace)
    rows = 2 * n if loss == "nt_xent" else n
    if world_size > 1:
        mode = choose_mode(mode, world_size * n, d, world_size, dtype, True)
    ring = world_size > 1 and mode == "ring"
    kind = Kind(loss, one_pass=loss in ("info_nce", "siglip_loss") and not ring)
    # Rows and columns of this rank's blocks: one, or one for each rank.
    blocks = [(rows, m or rows, loss == "nt_xent")]
    if world_size > 1 and loss == "nt_xent":  # half of the other ranks' rows
        blocks += [(rows, rows, False)] * ((world_size - 1) // 2)
        blocks += [(rows // 2, rows, False)] * (world_size % 2 == 0 and rows > 1)
    elif world_size > 1:
        blocks = [(rows, rows, False)] * world_size if ring else [(rows, world_size * rows, False)]
    costs = [
        block_cost(kind, r, c, d, dtype, backend, budget, symmetric=own) for r, c, own in blocks
    ]
    return _together(
        costs, kind, d, dtype, backend, world_size, mode if world_size > 1 else None, reduce_dtype
    )


def _together(
    costs: list[BlockCost],
    kind: Kind,
    dim: int,
    dtype: torch.dtype,
    backend: str,
    world_size: int,
    mode: str | None,
    reduce_dtype: torch.dtype | None,
) -> Explanation:
    """The blocks of one rank as one plan."""
    first, wide = costs[0], accumulation_dtype(dtype)
    n = first.plan.n
    m = first.plan.m if world_size == 1 else n * world_size
    exchange, accumulators = ExchangeCost(), first.accumulators
    if mode is not None:
        exchange = exchange_cost(
            n,
            world_size,
            dim,
            dtype,
            mode=mode,
            symmetric=kind.loss == "nt_xent",
            columns=kind.loss in ("clip_loss", "nt_xent"),
            reduce_dtype=reduce_dtype,
        )
        # This rank's rows', and all columns' and those on their way, or a block's own, new, coming
        # and going.
        columns = 4 * n if mode == "ring" else 2 * sum(cost.plan.m for cost in costs)
        accumulators = (n + columns) * dim
    whole = n * m
    area = sum(cost.products for cost in costs)
    return Explanation(
        kind.loss,
        backend,
        dtype,
        n,
        m,
        dim,
        first.plan,
        sum(cost.tiles for cost in costs),
        first.passes,
        round(area / whole, 3),
        area * 2.0 * dim,
        sum(cost.launches for cost in costs),
        sum(cost.traffic for cost in costs),
        max(cost.workspace for cost in costs),
        accumulators * wide.itemsize,
        world_size,
        mode,
        exchange.sent,
        exchange.held,
    )
