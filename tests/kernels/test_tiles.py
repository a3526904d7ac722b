"""The compiled tile kernels and the portable ones, one tile at a time, against long doubles.

The tolerance is the float64 rule's, with the portable kernels in the place of eager PyTorch: twice
their error plus 4 ulp of the largest element; and 1 ulp for 64 terms of a sum, as PyTorch adds in
pairs, and narrow vectors one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcl.kernels.cpu.backend import CompiledTiles
from fastcl.kernels.tiles import Running, Side, Sums, TorchTiles
from tests.kernels import dense
from tests.kernels.dense import Given, Options
from tests.rule import Error

extension = pytest.importorskip("fastcl._C", reason="no compiled kernels")
COMPILED, PORTABLE = CompiledTiles(extension), TorchTiles()

Run = Callable[[Any, Given], dict[str, Tensor]]
ROWS = (1, 7, 8, 9, 63, 64, 65)
TALL = (257, 512, 1025)  # blocks of several patches, and several blocks
COLS = (1, 3, 15, 16, 17, 63, 64, 65, 511, 512, 513)
EVERY = Options(row_scale=True, row_bias="rows", col_bias=True, ids=True, diagonal=0)
PLAIN = Options()


def _errors(kernels: Any, run: Run, given: list[Given], truths: list[Any]) -> dict[str, Error]:
    errors: dict[str, Error] = {}
    for draw, right in zip(given, truths, strict=True):
        made = run(kernels, draw)
        assert made.keys() == right.keys()
        for name, value in made.items():
            errors.setdefault(name, Error()).add(value, right[name])
    return errors


def _compare(run: Run, given: list[Given]) -> None:
    truths = [dense.truth(draw, run.__name__) for draw in given]
    portable = _errors(PORTABLE, run, given, truths)
    compiled = _errors(COMPILED, run, given, truths)
    of_sums = max(max(draw.s.shape) for draw in given) / 64
    for name, error in compiled.items():
        allowed = 2 * portable[name].largest_error + (4 + of_sums) * error.ulp
        assert error.largest_error <= allowed, (name, error, portable[name])
    # The portable kernels are right themselves: some ulp of a logit, as a factor.
    largest = 64 * max(1.0, *(float(draw.magnitude()) for draw in given))
    for name, error in portable.items():
        assert error.largest_error <= largest * error.ulp, (name, error)


RUNS = (dense.statistics, dense.gradient, dense.online, dense.sigmoid)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_around_the_edges_of_vectors_and_patches(run: Any, cols: int) -> None:
    for rows, options in product(ROWS, (PLAIN, EVERY)):
        _compare(run, [Given(seed, rows, cols, options) for seed in range(4)])


@pytest.mark.parametrize("rows", TALL)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_tall_tiles(run: Any, rows: int) -> None:
    for cols in (17, 600):
        _compare(run, [Given(seed, rows, cols, EVERY) for seed in (0, 1)])


DIAGONALS = (None, 0, 5, -4, 20, 21, -8, -9, 1 << 40)  # of 9 x 21: the last ones lie outside
COMBINATIONS = [
    Options(*combination)
    for combination in product((False, True), (None, "one", "rows"), (False, True), (False, True))
]


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_every_combination_of_options(run: Any, diagonal: int | None) -> None:
    for options in COMBINATIONS:
        options = options._replace(diagonal=diagonal)
        _compare(run, [Given(seed, 9, 21, options) for seed in range(2)])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_float64(run: Any) -> None:
    for rows, cols in ((9, 21), (65, 513)):
        _compare(run, [Given(3, rows, cols, EVERY, dtype=torch.float64)])


@pytest.mark.parametrize("wanted", list(product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("run", [dense.gradient, dense.sigmoid], ids=["gradient", "sigmoid"])
def test_sums_that_are_not_wanted(run: Any, wanted: tuple[bool, bool, bool]) -> None:
    given = Given(4, 65, 67, EVERY, sums=wanted)
    _compare(run, [given])
    assert ("row_gs" in run(COMPILED, given), "col_g" in run(COMPILED, given)) == wanted[::2]


@pytest.mark.parametrize("sides", ["rows", "cols", "both"])
@pytest.mark.parametrize("run", [dense.statistics, dense.gradient], ids=["statistics", "gradient"])
def test_one_side_and_both(run: Any, sides: str) -> None:
    for cols in (17, 513):
        _compare(run, [Given(5, 65, cols, EVERY, sides=sides)])


# Spreads of the lines' maxima. One e^x serves rows and columns up to 42.
@pytest.mark.parametrize("spread", [14, 41, 43, 70, 350, 3500])
@pytest.mark.parametrize("lines", ["rows", "cols", "both"])
@pytest.mark.parametrize("run", [dense.statistics, dense.gradient], ids=["statistics", "gradient"])
def test_lines_of_very_different_maxima(run: Any, lines: str, spread: int) -> None:
    options = Options(row_bias="rows", col_bias=True, diagonal=1)
    for rows, cols in ((8, 16), (17, 65), (65, 513)):
        draws = [Given(seed, rows, cols, options) for seed in range(4)]
        for given in draws:
            for bias in [given.row_bias] * (lines != "cols") + [given.col_bias] * (lines != "rows"):
                bias[::3] -= spread
        _compare(run, draws)
        # No line underflows: each keeps at least its own maximum, e^0.
        if run is dense.statistics:
            assert all(torch.isfinite(x).all() for x in run(COMPILED, draws[0]).values())


@pytest.mark.parametrize("kernels", [COMPILED, PORTABLE], ids=["compiled", "portable"])
def test_a_tile_made_again_may_differ_in_its_last_bit(kernels: Any) -> None:
    """At logits of 1e9 that bit is 64, and e^64 would be in place of 1."""
    s = torch.full((9, 40), 1e9).nextafter(torch.tensor(2e9))
    rows, cols = torch.full((9,), 1e9), torch.full((40,), 1e9)
    given = Given(0, 9, 40, PLAIN, s=s)
    given.scale[:] = 1.0
    sides = Side(rows, torch.ones(9)), Side(cols, torch.full((40,), 2.0))
    for row, col in (sides, (sides[0], None), (None, sides[1])):
        tile = given.tile()
        kernels.softmax_gradient(tile, row, col, Sums())
        right = (row is not None) * 1.0 + (col is not None) * 2.0
        assert (tile.s == right).all()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_empty_lines(run: Any) -> None:
    for rows, cols in ((1, 1), (8, 16), (9, 33), (65, 513)):
        given = Given(7, rows, cols, Options(ids=True, diagonal=0), fresh=True)
        given.row_ids[rows // 2 :] = 1
        given.col_ids[:] = 1  # the lower rows see nothing at all
        given.col_ids[cols // 2 :] = 2
        _compare(run, [given])
        given.row_ids[:] = given.col_ids[:] = 1
        _compare(run, [given])
        if run is dense.statistics:
            assert all((x == -math.inf).all() for x in run(COMPILED, given).values())


def test_a_pair_on_the_diagonal_is_written_and_nothing_else() -> None:
    for diagonal in (0, 3, 20, -5, -8, 21, -9):
        for kernels in (COMPILED, PORTABLE):
            given = Given(8, 9, 21, Options(diagonal=diagonal, col_bias=True))
            tile = given.tile()
            kernels.softmax_statistics(tile, given.running(9), None)
            inside = [i for i in range(9) if 0 <= i + diagonal < 21]
            outside = [i for i in range(9) if i not in inside]
            assert torch.equal(
                tile.pairs.s[inside], given.s[inside, [i + diagonal for i in inside]]
            )
            logits = torch.from_numpy(given.logits(masked=False).astype(np.float32))
            right = logits[inside, [i + diagonal for i in inside]]
            torch.testing.assert_close(tile.pairs.logits[inside], right)
            assert (tile.pairs.s[outside] == dense.UNTOUCHED).all()
            assert (tile.pairs.logits[outside] == dense.UNTOUCHED).all()


def _of(s: Tensor) -> Given:
    given = Given(0, *s.shape, PLAIN, s=s)
    given.scale[:] = 3
    return given


@pytest.mark.parametrize("growth", [-30.0, 0.0, 30.0, 300.0])
@pytest.mark.parametrize("kernels", [COMPILED, PORTABLE], ids=["compiled", "portable"])
def test_online_rescaling_over_tiles(kernels: Any, growth: float) -> None:
    """What was accumulated, rescaled as told, is the softmax of all tiles together."""
    parts = [torch.randn(9, cols) + growth * k for k, cols in enumerate((17, 1, 64))]
    running = Running(torch.full((9,), -math.inf), torch.zeros(9))
    es, rescale, kept = torch.zeros(9), torch.empty(9), []
    for part in parts:
        tile = _of(part).tile()
        kernels.softmax_online(tile, running, es, rescale)
        kept = [*(x * rescale[:, None] for x in kept), tile.s]
    top, total, given = running.max, running.sum, _of(torch.cat(parts, dim=1))
    logits = given.logits()
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    weight = softmax.sum(axis=1, keepdims=True)
    magnitude = float(abs(logits).max())
    close = {"rtol": 0, "atol": 4 * magnitude * 2**-24}

    def check(ours: Tensor, right: np.ndarray) -> None:
        torch.testing.assert_close(ours.double(), torch.from_numpy(right.astype(float)), **close)

    check(torch.cat(kept, dim=1) / total[:, None], softmax / weight)
    largest = float(abs(given.s).max())
    check(es / total / largest, (softmax / weight * given.s.numpy()).sum(axis=1) / largest)
    check((top + total.log()) / magnitude, dense.logsumexp(logits, 1) / magnitude)


# ---- the elementary functions ----

EPS = 2.0**-23  # one ulp of float32, relative, at most
SMALLEST = -110 * math.log(2)  # below, exponentials and gradients are stored as 0
X = np.concatenate([np.linspace(-87, 0, 200_001), -np.logspace(-30, 0, 20_001)]).astype("f4")


def _column(x: np.ndarray) -> Given:
    """A tile of one column with exactly these logits."""
    given = Given(0, len(x), 1, PLAIN, s=torch.from_numpy(x)[:, None].clone())
    given.scale[:] = 1.0
    return given


def _relative_error(ours: Tensor, right: np.ndarray) -> float:
    return float(abs(ours.numpy().astype(np.longdouble) / right - 1).max())


def test_exp_is_within_an_ulp() -> None:
    """Down to 2^-110, and exactly 0 where products with the result would be subnormal."""
    x = X[X > SMALLEST]
    tile, zeros = _column(x).tile(), torch.zeros(len(x))
    COMPILED.softmax_online(tile, Running(zeros, zeros.clone()), zeros.clone(), zeros.clone())
    assert _relative_error(tile.s[:, 0], np.exp(x.astype(np.longdouble))) <= 1.0 * EPS
    below = np.array([SMALLEST - 0.5, -88, -104, -1e4, -1e30, -np.inf], dtype="f4")
    tile, zeros = _column(below).tile(), torch.zeros(len(below))
    COMPILED.softmax_online(tile, Running(zeros, zeros.clone()), zeros.clone(), zeros.clone())
    assert (tile.s == 0).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_softplus_and_its_derivative_are_within_2_ulp(sign: int) -> None:
    """log(1 + e^x), of which small values keep their digits, and the sigmoid."""
    x = (-sign * X).astype("f4")
    tile, loss = _column(x).tile(), torch.zeros(len(x))
    COMPILED.sigmoid(tile, loss, None, True, Sums())
    wide = x.astype(np.longdouble)
    assert _relative_error(loss, np.maximum(wide, 0) + np.log1p(np.exp(-abs(wide)))) <= 2 * EPS
    normal = wide > SMALLEST
    error = _relative_error(tile.s[normal, 0], (1 / (1 + np.exp(-wide)))[normal])
    assert error <= 2 * EPS
