"""The same inputs give the same bits: call after call, and for any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.kernels.cpu import backend as compiled
from fastcl.kernels.cpu.amx import AmxProducts
from fastcl.kernels.tiles import ColTerms, Pairs, RowTerms, Running, Side, Sums, Tile
from fastcl.kernels.walk import Total
from tests.cases import LOSSES, Case

THREADS = (1, 2, 3)
needs_extension = pytest.mark.skipif(
    compiled._extension is None, reason="no compiled kernels to test"
)
needs_amx = pytest.mark.skipif(
    compiled._extension is None or not compiled._extension.amx_available(),
    reason="this processor has no AMX",
)


def evaluate(case: Case, dtype: torch.dtype, **how: Any) -> dict[str, Tensor]:
    """Loss and gradients on fixed inputs, with several tiles each way."""
    tensors = {
        name: x.to(dtype).requires_grad_() if x.is_floating_point() else x
        for name, x in case.tensors(seed=3, n=300, d=40, scale=20.0, cone=True).items()
    }
    # Freed blocks full of NaN lie where the next buffers will: a read of unset memory shows.
    for size in (300, 40 * 300, 64 * 256, 96 * 1024, 300 * 600):
        torch.full((size,), torch.nan)
    loss = case.ours(**tensors, **case.options, workspace=1 << 19, **how)
    loss.square().sum().backward()
    grads = {name: x.grad for name, x in tensors.items() if x.is_floating_point()}
    return {"loss": loss.detach()} | {name: g for name, g in grads.items() if g is not None}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor], what: str = "") -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert not a[name].isnan().any(), f"{name} is NaN"
        wrong = (a[name] != b[name]).sum().item()
        assert wrong == 0, f"{wrong} of {a[name].numel()} elements of {name} differ {what}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_the_same_call_gives_the_same_bits(case: Case, dtype: torch.dtype, backend: str) -> None:
    torch.set_num_threads(2)  # the fixture of conftest.py restores it
    first = evaluate(case, dtype, backend=backend)
    assert len(first) >= 4  # the loss, two towers, a scale
    assert_same_bits(first, evaluate(case, dtype, backend=backend))


@needs_amx
@pytest.mark.parametrize("case", [c for c in LOSSES if "paired" not in c.name], ids=str)
def test_bfloat16_losses_do_not_depend_on_threads(case: Case) -> None:
    """With AMX every matrix product is ours; in float32 PyTorch's answer for themselves."""
    torch.set_num_threads(1)
    serial = evaluate(case, torch.bfloat16, backend="cpu")
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        result = evaluate(case, torch.bfloat16, backend="cpu")
        assert_same_bits(serial, result, f"with {threads} threads")


# ---- single tiles ------------------------------------------------------------------------------

ROWS, COLS = 200, 1500  # several blocks of rows, and several patches of columns


class Inputs:
    """One tile with everything that a tile may have, and lines for it; the same every time."""

    def __init__(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        ids_dtype = torch.int64 if dtype == torch.float64 else torch.int32
        row_ids = torch.randint(0, 400, (ROWS,), generator=g).to(ids_dtype)
        col_ids = torch.randint(0, 400, (COLS,), generator=g).to(ids_dtype)
        self.pairs = Pairs(torch.zeros(ROWS, dtype=dtype), torch.zeros(ROWS, dtype=dtype))
        self.tile = Tile(
            s=normal(ROWS, COLS),
            rows=RowTerms(5 + normal(ROWS), normal(ROWS), row_ids),
            # Column biases far apart: both ways through a patch are taken.
            cols=ColTerms(20 * normal(COLS), col_ids),
            diagonal=7,
            pairs=self.pairs,
        )
        self.rows = Running(normal(ROWS), normal(ROWS).abs() + 1)
        self.cols = Running(normal(COLS), normal(COLS).abs() + 1)
        self.row_side = Side(60 + normal(ROWS), normal(ROWS))
        self.col_side = Side(60 + normal(COLS), normal(COLS))
        self.sums = Sums(normal(ROWS), normal(ROWS), normal(COLS))
        self.vectors = [normal(ROWS).abs(), normal(ROWS).abs()]

    def everything(self) -> dict[str, Tensor]:
        """All that a kernel may write."""
        found = {"s": self.tile.s, "pairs.s": self.pairs.s, "pairs.logits": self.pairs.logits}
        for name in ("rows", "cols", "sums"):
            found |= {f"{name}.{k}": x for k, x in vars(getattr(self, name)).items()}
        return found | {f"vector {i}": x for i, x in enumerate(self.vectors)}


KERNELS: dict[str, Callable[[Any, Inputs], None]] = {
    "statistics": lambda k, x: k.softmax_statistics(x.tile, x.rows, x.cols),
    "statistics of rows": lambda k, x: k.softmax_statistics(x.tile, x.rows, None),
    "statistics of columns": lambda k, x: k.softmax_statistics(x.tile, None, x.cols),
    "gradient": lambda k, x: k.softmax_gradient(x.tile, x.row_side, x.col_side, x.sums),
    "gradient of rows": lambda k, x: k.softmax_gradient(x.tile, x.row_side, None, x.sums),
    "gradient of columns": lambda k, x: k.softmax_gradient(x.tile, None, x.col_side, x.sums),
    "online": lambda k, x: k.softmax_online(x.tile, x.rows, *x.vectors),
    "sigmoid": lambda k, x: k.sigmoid(x.tile, x.vectors[0], x.vectors[1], True, x.sums),
    "sigmoid loss": lambda k, x: k.sigmoid(x.tile, x.vectors[0], None, False, Sums()),
}


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", KERNELS)
def test_tile_kernels_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    kernels = compiled.CompiledTiles(compiled._extension)

    def outcome(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        inputs = Inputs(dtype)
        before = {key: x.clone() for key, x in inputs.everything().items()}
        KERNELS[name](kernels, inputs)
        after = inputs.everything()
        assert any((after[key] != before[key]).any() for key in before), "nothing was written"
        return after

    serial = outcome(1)
    for threads in (*THREADS[1:], 2):  # and more than once, for what only sometimes collides
        assert_same_bits(serial, outcome(threads), f"with {threads} threads")


@needs_amx
def test_amx_products_do_not_depend_on_threads() -> None:
    rows, cols, d = 600, 333, 100  # several tasks of 256 rows
    u, v = torch.randn(rows, d).bfloat16(), torch.randn(cols, d).bfloat16()
    g, du, dv = torch.randn(rows, cols), torch.randn(rows, d), torch.randn(cols, d)

    def outcome(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        products = AmxProducts(compiled._extension)
        a, b, s = products.rows(u), products.cols(v), torch.empty(rows, cols)
        products.similarity(a, b, s)
        da, db = du.clone(), dv.clone()
        products.gradients(g, a, b, Total(da, empty=False), Total(db, empty=False))
        assert (da != du).any()
        assert (db != dv).any()
        return {"s": s, "da": da, "db": db}

    serial = outcome(1)
    for threads in (*THREADS[1:], 2):
        assert_same_bits(serial, outcome(threads), f"with {threads} threads")
