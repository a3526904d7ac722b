"""One tile with its options, and what the kernels should make of it, in long doubles."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcl.kernels.tiles import ColTerms, Pairs, RowTerms, Running, Side, Sums, Tile

UNTOUCHED = 12345.0
LONG = np.longdouble


class Options(NamedTuple):
    """Which of a tile's parts are there."""

    row_scale: bool = False
    row_bias: str | None = None  # "one" or "rows"
    col_bias: bool = False
    ids: bool = False
    diagonal: int | None = None


class Given:
    """A tile's inputs; every call of :meth:`tile` copies those that kernels overwrite.

    `fresh`: running statistics start empty, not with what an earlier tile left.
    """

    def __init__(
        self,
        seed: int,
        rows: int,
        cols: int,
        options: Options,
        *,
        dtype: torch.dtype = torch.float32,
        s: Tensor | None = None,
        sums: tuple[bool, bool, bool] = (True, True, True),
        sides: str = "both",
        fresh: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + 17 * rows + cols)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def ids(n: int) -> Tensor:
            width = torch.int64 if dtype == torch.float64 else torch.int32
            return torch.randint(0, 6, (n,), generator=generator).to(width)

        self.dtype, self.options, self.sums, self.sides = dtype, options, sums, sides
        self.s = normal(rows, cols) if s is None else s
        self.scale = 3 + normal(rows if options.row_scale else 1).tanh()
        bias_rows = {"one": 1, "rows": rows}.get(options.row_bias or "")
        self.row_bias = None if bias_rows is None else normal(bias_rows)
        self.col_bias = normal(cols) if options.col_bias else None
        self.row_ids, self.col_ids = (ids(rows), ids(cols)) if options.ids else (None, None)
        self.before = {n: normal(n).abs() for n in (rows, cols)}  # earlier sums, gradients' weights
        self.fresh = fresh

    def tile(self) -> Tile:
        """The tile, in storage whose surroundings tell if a kernel writes outside."""
        rows, cols = self.s.shape
        pairs = [torch.full((rows,), UNTOUCHED, dtype=self.dtype) for _ in range(2)]
        storage = torch.full((rows + 2, cols + 3), UNTOUCHED, dtype=self.dtype)
        s = storage[1:-1, 1 : cols + 1].copy_(self.s)
        return Tile(
            s,
            RowTerms(self.scale, self.row_bias, self.row_ids),
            ColTerms(self.col_bias, self.col_ids),
            self.options.diagonal,
            None if self.options.diagonal is None else Pairs(*pairs),
        )

    def running(self, lines: int) -> Running:
        """The statistics of an earlier tile, or of none."""
        if self.fresh:
            empty = torch.full((lines,), -torch.inf, dtype=self.dtype)
            return Running(empty, torch.zeros_like(empty))
        top = 4 * self.before[lines] - 2
        return Running(top, 1 + self.before[lines])

    def logits(self, masked: bool = True) -> np.ndarray:
        """The logits, -inf where a pair is dropped."""
        s, scale = (x.numpy().astype(LONG) for x in (self.s, self.scale))
        logits = s * scale[:, None]
        if self.row_bias is not None:
            logits += self.row_bias.numpy().astype(LONG)[:, None]
        if self.col_bias is not None:
            logits += self.col_bias.numpy().astype(LONG)
        if not masked:
            return logits
        rows, cols = np.arange(s.shape[0])[:, None], np.arange(s.shape[1])
        if self.options.diagonal is not None:
            logits[cols == rows + self.options.diagonal] = -np.inf
        if self.row_ids is not None and self.col_ids is not None:
            logits[self.row_ids.numpy()[:, None] == self.col_ids.numpy()] = -np.inf
        return logits

    def magnitude(self) -> float:
        """The largest logit: its rounding is a factor of every exponential."""
        return float(abs(self.logits(masked=False)).max())

    def side(self, axis: int) -> Side:
        """A side of G: maxima no less than any logit of the line, as statistics leave them."""
        lines = self.s.shape[1 - axis]
        top = self.logits().max(axis=axis).astype(np.float64)
        return Side(torch.from_numpy(top).to(self.dtype), self.before[lines].clone())

    def start(self, lines: int, wanted: bool = True) -> Tensor | None:
        """What a sum holds before the tile is added to it."""
        return 0.5 + self.before[lines] if wanted else None

    def wanted_sums(self) -> Sums:
        rows, cols = self.s.shape
        return Sums(*(self.start(n, w) for n, w in zip((rows, rows, cols), self.sums, strict=True)))


def logsumexp(logits: np.ndarray, axis: int) -> np.ndarray:
    """-inf for an empty line."""
    top = logits.max(axis=axis, keepdims=True)
    ref = np.where(np.isneginf(top), LONG(0), top)
    with np.errstate(divide="ignore"):
        return (np.log(np.exp(logits - ref).sum(axis=axis, keepdims=True)) + ref).squeeze(axis)


def _checked(tile: Tile) -> Tensor:
    """The tile's elements, after a look at what surrounds them."""
    whole = tile.s._base
    assert whole is not None
    outside = whole.clone()
    outside[1:-1, 1 : tile.s.shape[1] + 1] = UNTOUCHED
    assert (outside == UNTOUCHED).all(), "a kernel wrote outside its tile"
    return tile.s


def _named(sums: Sums) -> dict[str, Tensor]:
    return {name: x for name, x in vars(sums).items() if x is not None}


def statistics(kernels: Any, given: Given) -> dict[str, Tensor]:
    """The logsumexps of rows and columns, an earlier tile's included."""
    tile, (n, m) = given.tile(), given.s.shape
    lines = {
        k: given.running(x) for k, x in (("rows", n), ("cols", m)) if given.sides in (k, "both")
    }
    kernels.softmax_statistics(tile, lines.get("rows"), lines.get("cols"))
    assert torch.equal(_checked(tile), given.s), "statistics leave the tile as it is"
    # In the kernel's dtype, as the rule counts its ulps; the two parts are added in float64.
    return {name: running.log().to(given.dtype) for name, running in lines.items()}


def gradient(kernels: Any, given: Given) -> dict[str, Tensor]:
    """scale G and its sums."""
    tile, sums = given.tile(), given.wanted_sums()
    rows = given.side(1) if given.sides != "cols" else None
    cols = given.side(0) if given.sides != "rows" else None
    kernels.softmax_gradient(tile, rows, cols, sums)
    return {"s": _checked(tile), **_named(sums)}


def online(kernels: Any, given: Given) -> dict[str, Tensor]:
    """Probabilities and means, free of the reference point that each kernel chose."""
    tile, n = given.tile(), given.s.shape[0]
    running, es, rescale = given.running(n), torch.zeros(n), torch.full((n,), UNTOUCHED)
    es, rescale = es.to(given.dtype), rescale.to(given.dtype)
    old = running.sum.clone()
    kernels.softmax_online(tile, running, es, rescale)
    total = running.sum.masked_fill(running.sum == 0, 1)
    return {
        "p": _checked(tile) / total[:, None],
        "mean": es / total,
        "share of the old": old * rescale / total,
        "logsumexp": running.log().to(given.dtype),
    }


def sigmoid(kernels: Any, given: Given) -> dict[str, Tensor]:
    """Row losses, scale weight sigmoid(l), and its sums."""
    n = given.s.shape[0]
    tile, loss_only, sums = given.tile(), given.tile(), given.wanted_sums()
    loss, again = given.start(n), given.start(n)
    kernels.sigmoid(tile, loss, given.before[n], True, sums)
    kernels.sigmoid(loss_only, again, None, False, Sums())
    assert torch.equal(_checked(loss_only), given.s), "without a gradient the tile stays"
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    return {"s": _checked(tile), "loss": loss, **_named(sums)}


def _long(x: Tensor) -> np.ndarray:
    return x.numpy().astype(LONG)


def _with_sums(given: Given, g: np.ndarray) -> dict[str, np.ndarray]:
    """scale G, and the sums that are wanted."""
    s, start = _long(given.s), given.wanted_sums()
    right = {"s": g * _long(given.scale)[:, None]}
    added = {"row_gs": (g * s).sum(axis=1), "row_g": g.sum(axis=1), "col_g": g.sum(axis=0)}
    return right | {name: _long(x) + added[name] for name, x in _named(start).items()}


def truth(given: Given, name: str) -> dict[str, np.ndarray]:
    """What the run of that name should give."""
    logits, (n, m) = given.logits(), given.s.shape
    if name == "gradient":
        g = np.zeros_like(logits)
        for axis in [1] * (given.sides != "cols") + [0] * (given.sides != "rows"):
            side = given.side(axis)
            top = np.where(np.isneginf(_long(side.max)), LONG(0), _long(side.max))
            g += np.expand_dims(_long(side.weight), axis) * np.exp(
                logits - np.expand_dims(top, axis)
            )
        return _with_sums(given, g)
    if name == "sigmoid":
        natural = logits
        weighted = _long(given.before[n])[:, None] / (1 + np.exp(-natural))
        loss = np.logaddexp(natural, LONG(0)).sum(axis=1) + _long(given.start(n))
        return {"loss": loss, **_with_sums(given, weighted)}
    right = {}
    for line, size, axis in (("rows", n, 1), ("cols", m, 0)):
        old = given.running(size)
        with np.errstate(divide="ignore"):
            before = _long(old.max) + np.log(_long(old.sum))
        right[line] = logsumexp(np.stack([before, logsumexp(logits, axis)]), 0)
        if line == "rows":
            before_rows = before
    if name == "statistics":
        return {k: x for k, x in right.items() if given.sides in (k, "both")}
    ref = np.where(np.isneginf(right["rows"]), LONG(0), right["rows"])
    p = np.exp(logits - ref[:, None])
    return {
        "p": p,
        "mean": (p * _long(given.s)).sum(axis=1),
        "share of the old": np.exp(before_rows - ref),
        "logsumexp": right["rows"],
    }
