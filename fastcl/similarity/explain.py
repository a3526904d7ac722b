"""What a loss is going to do, before it does it: chunks, products, launches, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Stream
from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.kernels.plan import Chunk, TilePlan
from fastcl.kernels.triton.plan import ALIGNMENT, PROCESSORS, blocks_for, by_library, owned_bytes
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
) -> Explanation:
    """How a loss's forward and backward would be computed: nothing is computed here.

    The plan is a function of these arguments alone, so that a plan for a GPU (an H200) can be read
    without one.

    Args:
        loss: "info_nce", "clip_loss", "siglip_loss" or "nt_xent", with mean or sum and gradients
            for all embeddings.
        n: rows of each tower (nt_xent: of each view).
        d: dimension of the embeddings.
        m: keys of info_nce with separate negatives; None: n.
        dtype: of the embeddings.
        backend: "cpu", "torch", "triton"; "auto": the one for CPU tensors.
        workspace: bytes that the tiles may take; None: the backend's default.

    Raises:
        ValueError, TypeError: for a loss, size, dtype or backend that there is not.

    Example:
        >>> import fastcl, torch
        >>> plan = fastcl.explain("clip_loss", 65536, 768, dtype=torch.bfloat16, backend="triton")
        >>> plan.products, plan.tiles
        (4.0, 48)
        >>> print(plan)  # doctest: +ELLIPSIS
        loss          clip_loss, 65536 x 65536 pairs, D = 768, torch.bfloat16
        ...
    """
    check_choice("loss", loss, _LOSSES)
    check_dtype("loss", dtype)
    for name, size in (("n", n), ("d", d), ("m", n if m is None else m)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{name} is {size!r}; expected a positive number of rows or dimensions"
            )
    if m is not None and loss != "info_nce":
        raise ValueError(f"m has no meaning for {loss}, which pairs all rows: leave it out")
    dispatch.check_name(backend)
    if backend == dispatch.AUTO:
        backend = dispatch.resolve(backend, torch.device("cpu"))
    if backend == dispatch.REFERENCE:
        raise ValueError("the reference stores the whole matrix: there is no plan to explain")
    symmetric = loss == "nt_xent"
    n, m = (2 * n, 2 * n) if symmetric else (n, m or n)
    found = dispatch.get(backend)
    u, v = (torch.empty(rows, d, dtype=dtype, device="meta") for rows in (n, m))
    scale = torch.empty(1, device="meta")
    budget = check_workspace(workspace, found.default_workspace)
    stream = Stream(u, None if symmetric else v, scale, None, None, None, None, 0, budget)
    plan = found.plan(stream, keep=loss == "info_nce")
    rows, cols = list(plan.row_chunks()), list(plan.col_chunks())
    pairs = [(r, c) for r in rows for c in cols if not symmetric or c.start >= r.start]
    # Of the symmetric matrix, tiles on the diagonal have no mirror image.
    diagonal = [(r, c) for r, c in pairs if symmetric and r.start == c.start]
    parts = found.products(stream).parts(plan)
    passes, made, kernels = _passes(loss, plan)
    of_side = (parts + 1, 1) if plan.owned else (parts, parts)  # products, and launches
    area, mirrorless = (sum(r.size * c.size for r, c in some) for some in (pairs, diagonal))
    products = (made * area + of_side[0] * (2 * area - mirrorless)) / (n * m)
    launches = len(pairs) * (kernels + 2 * of_side[1]) - len(diagonal) * of_side[1]
    fused = backend == "triton" and dtype != torch.float64
    if fused and loss != "siglip_loss":  # partial statistics are merged in launches of their own
        launches += len(pairs) * (1 if loss == "info_nce" else 2) - len(diagonal)
    if fused and not plan.owned:  # similarities that the library makes are launches, too
        padded = d + -d % ALIGNMENT
        blocks = blocks_for(dtype.itemsize, padded, split=parts == 2)
        few = [by_library(r.size, c.size, padded, blocks, PROCESSORS) for r, c in pairs]
        launches += made * sum(few)
    wide = accumulation_dtype(dtype)
    if loss in ("info_nce", "siglip_loss"):  # made in the forward, they wait for the backward
        accumulators = (n + m) * d
    else:
        accumulators = (m + min(plan.rows, n)) * d if dtype != wide else 0
    tile = 0 if plan.owned else parts * min(plan.rows, n) * min(plan.cols, m)
    if plan.owned:
        stored = owned_bytes(min(plan.rows, n), min(plan.cols, m), d)
    else:
        stored = plan.workspace * wide.itemsize if plan.keep or not fused else 0
    return Explanation(
        loss,
        backend,
        dtype,
        n,
        m,
        d,
        plan,
        len(pairs),
        passes,
        round(products, 3),
        products * 2.0 * n * m * d,
        launches,
        _traffic(
            plan, pairs, symmetric, d, dtype, passes=(made, kernels), parts=parts, fused=fused
        ),
        stored + (tile * dtype.itemsize if fused else 0),
        accumulators * wide.itemsize,
    )


def _passes(loss: LossName, plan: TilePlan) -> tuple[tuple[str, ...], int, int]:
    """(what is done with each tile, how often it is made for that, kernels beside the products)."""
    statistics = () if loss == "siglip_loss" else ("statistics",)
    count = len(statistics)
    if plan.owned:  # the products, and the similarities for them, are the owners' kernels
        what = "gradient" if statistics else "loss and gradient"
        return (*statistics, f"{what} by the rows' owners, then the columns'"), count, count
    if loss == "siglip_loss":
        return ("loss and gradient", "two gradient products"), 1, 1
    made = "kept similarities" if plan.keep else "similarities made again"
    passes = (*statistics, f"gradient from {made}", "two gradient products")
    return passes, 1 if plan.keep else 2, 2


def _traffic(
    plan: TilePlan,
    pairs: list[tuple[Chunk, Chunk]],
    symmetric: bool,
    dim: int,
    dtype: torch.dtype,
    *,
    passes: tuple[int, int],
    parts: int,
    fused: bool,
) -> int:
    """Bytes of tiles, operands and accumulators; `passes`: (products of S, kernels over a tile)."""
    wide, item = accumulation_dtype(dtype).itemsize, dtype.itemsize
    made, kernels = passes
    products = 1 if plan.owned else parts  # that add to an accumulator, for each side of a tile
    tiles = operands = added = 0
    for r, c in pairs:
        size, lines = r.size * c.size, r.size + c.size
        sides = 1 if symmetric and r.start == c.start else 2
        if plan.owned:
            operands += (made + sides) * lines
        else:
            operands += made * lines + parts * (lines if sides == 2 else c.size)
        if fused and not plan.owned:  # G written, and read for each side; kept similarities
            tiles += parts * item * (1 + sides) * size + (2 * wide * size if plan.keep else 0)
        elif not fused:  # S written and read, G written and read
            tiles += wide * (made + kernels + 1 + sides) * size
        added += products * (lines if sides == 2 else r.size)
    first = plan.n if symmetric else plan.n + plan.m  # written, not read
    return tiles + item * dim * operands + wide * dim * (2 * added - first)
