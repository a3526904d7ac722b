"""How many matrix products a loss costs, in products of the whole matrix: N M D multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl.kernels.cpu.amx import AmxProducts
from fastcl.kernels.plan import plan_symmetric
from fastcl.kernels.walk import Accumulator, TorchProducts

N, M, D = 160, 224, 8
SMALL = 1 << 16  # bytes: fewer than N full rows of float32 tiles fit


@dataclass
class Work:
    """Multiply-adds of the products that were made."""

    similarity: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.similarity + self.gradients


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Counts the products of PyTorch's matrix multiplication."""
    counted, made, added = Work(), TorchProducts.similarity, TorchProducts.gradients

    def similarity(self: Any, a: Tensor, b: Tensor, out: Tensor) -> None:
        counted.similarity += len(a) * len(b) * a.shape[1]
        made(self, a, b, out)

    def gradients(self: Any, g: Tensor, a: Tensor, b: Tensor, da: Any, db: Any) -> None:
        counted.gradients += g.numel() * a.shape[1] * ((da is not None) + (db is not None))
        added(self, g, a, b, da, db)

    monkeypatch.setattr(TorchProducts, "similarity", similarity)
    monkeypatch.setattr(TorchProducts, "gradients", gradients)
    return counted


Loss = Callable[..., Tensor]


def _info_nce(u: Tensor, v: Tensor, scale: Any, **options: Any) -> Tensor:
    return fastcl.info_nce(u, v, temperature=1 / scale, **options)


def _queue(u: Tensor, v: Tensor, scale: Any, **options: Any) -> Tensor:
    return fastcl.info_nce(u, torch.ones_like(u), v, temperature=1 / scale, **options)


_siglip = partial(fastcl.siglip_loss, logit_bias=-10.0)
# Losses as functions of u, v, scale; the rows of v; the products that both towers' gradients cost.
LOSSES: dict[str, tuple[Loss, int, int]] = {
    "clip": (fastcl.clip_loss, N, 4),
    "clip-none": (partial(fastcl.clip_loss, reduction="none"), N, 4),
    "symmetric": (partial(_info_nce, symmetric=True), N, 4),
    "info_nce": (_info_nce, N, 3),
    "info_nce-none": (partial(_info_nce, reduction="none"), N, 4),
    "queue": (_queue, M, 3),
    "siglip": (_siglip, N, 3),
    "siglip-none": (partial(_siglip, reduction="none"), N, 4),
}
FLOORS = {name: floor for name, (_, _, floor) in LOSSES.items()}


def run(name: str, wanted: str, dtype: torch.dtype = torch.float32, **options: Any) -> int:
    """A loss and its backward, with gradients for some of "u", "v", "s"; returns N M D."""
    function, cols, _ = LOSSES[name]
    leaves = {"u": torch.randn(N, D), "v": torch.randn(cols, D), "s": torch.tensor(2.0)}
    leaves = {k: (x if k == "s" else x.to(dtype)).requires_grad_() for k, x in leaves.items()}
    for key, x in leaves.items():
        x.requires_grad_(key in wanted)
    loss = function(*leaves.values(), **options).sum()
    if loss.requires_grad:
        loss.backward()
    assert {k for k, x in leaves.items() if x.grad is not None} == set(wanted)
    return N * cols * D


@pytest.mark.parametrize("scale", ["", "s"], ids=["scale-fixed", "scale-learned"])
@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_both_towers(name: str, floor: int, scale: str, backend: str, work: Work) -> None:
    unit = run(name, "uv" + scale, backend=backend)
    assert work.total == floor * unit
    assert work.gradients == 2 * unit


@pytest.mark.parametrize("frozen", ["u", "v"])
@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_a_frozen_tower_takes_one_off(
    name: str, floor: int, frozen: str, backend: str, work: Work
) -> None:
    unit = run(name, "uv".replace(frozen, ""), backend=backend)
    assert work.total == (floor - 1) * unit
    assert work.gradients == unit


@pytest.mark.parametrize(
    ("name", "wanted", "floor"),
    [
        *[("info_nce", "uv", 4), ("info_nce", "v", 3), ("info_nce", "u", 2), ("info_nce", "us", 2)],
        *[("queue", "uv", 4), ("queue", "v", 3), ("queue", "u", 2), ("queue", "s", 1)],
        *[("clip", "uv", 4), ("siglip", "uv", 3), ("siglip-none", "uv", 4)],
    ],
)
def test_where_rows_of_tiles_do_not_fit(
    name: str, wanted: str, floor: int, backend: str, work: Work
) -> None:
    unit = run(name, wanted, backend=backend, workspace=SMALL)
    assert work.total == floor * unit
    assert work.gradients == len(set(wanted) & set("uv")) * unit


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_one_product(name: str, backend: str, work: Work) -> None:
    with torch.no_grad():
        unit = run(name, "", backend=backend)
    assert (work.similarity, work.gradients) == (unit, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_no_grad_wins_over_requires_grad(name: str, backend: str, work: Work) -> None:
    function, cols, _ = LOSSES[name]
    u, v = torch.randn(N, D, requires_grad=True), torch.randn(cols, D, requires_grad=True)
    with torch.no_grad():
        function(u, v, 2.0, backend=backend)
    assert (work.similarity, work.gradients) == (N * cols * D, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_alone_needs_no_gradient_product(name: str, backend: str, work: Work) -> None:
    unit = run(name, "s", backend=backend)
    made_again = FLOORS[name] - 3  # for losses whose gradient is not made in the forward
    assert (work.similarity, work.gradients) == ((1 + made_again) * unit, 0)


def _nt_xent(n: int, wanted: str, **options: Any) -> None:
    z0 = torch.randn(n, D, requires_grad="0" in wanted)
    z1 = torch.randn(n, D, requires_grad="1" in wanted)
    fastcl.nt_xent(z0, z1, **options).backward()


@pytest.mark.parametrize(("n", "workspace"), [(512, SMALL), (300, SMALL), (100, None)])
def test_nt_xent(n: int, workspace: int | None, backend: str, work: Work) -> None:
    """4 N'^2 D operations, N' = 2N, and the mirrored halves of the tiles on the diagonal."""
    rows = 2 * n
    tile = plan_symmetric(rows, 4, workspace or 256 << 20).rows
    of_diagonal = sum(min(tile, rows - start) ** 2 for start in range(0, rows, tile))
    half = (rows * rows + of_diagonal) // 2  # the tiles on and above the diagonal
    _nt_xent(n, "01", backend=backend, workspace=workspace)
    assert work.total == (2 * half + rows * rows) * D
    operations, floor = 2 * work.total, 4 * rows**2 * D
    assert operations == floor + 2 * of_diagonal * D
    assert of_diagonal <= tile * rows  # of N'^2: the excess goes with tile / N'


def test_nt_xent_with_one_view_frozen(backend: str, work: Work) -> None:
    n, tile = 512, 128
    half = n * (n + tile) // 2
    _nt_xent(n, "0", backend=backend, workspace=SMALL)
    assert work.total == (3 * half + n * n + 3 * n * n) * D
    assert work.gradients == 2 * n * n * D


def test_bfloat16_on_amx(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    """The same, but each gradient product twice: G is split into two bfloat16 parts."""
    extension = pytest.importorskip("fastcl._C")
    if not extension.amx_available():
        pytest.skip("this processor has no AMX")
    done, multiply = [], AmxProducts._multiply

    def counted(self: Any, left: int, right: int, k: int, out: Tensor, **how: Any) -> None:
        done.append(out.numel() * k)
        multiply(self, left, right, k, out, **how)

    monkeypatch.setattr(AmxProducts, "_multiply", counted)
    for name, floor in FLOORS.items():
        for wanted in ("uv", "u", "v"):
            done.clear()
            unit = run(name, wanted, torch.bfloat16, backend="cpu")
            assert sum(done) == (floor - 2 + 2 * len(wanted)) * unit, (name, wanted)
    assert work.total == 0  # nothing was widened and multiplied by PyTorch


@pytest.mark.parametrize("name", ["clip", "info_nce", "siglip"])
def test_bfloat16_by_pytorch(name: str, work: Work) -> None:
    unit = run(name, "uv", torch.bfloat16, backend="torch")
    assert work.total == FLOORS[name] * unit


# Where an operator's five gradients begin among its outputs.
GRADIENTS_AT = {
    "fastcl::logsumexp_backward": 0,
    "fastcl::weighted_logsumexp": 2,
    "fastcl::sigmoid_sum": 1,
    "fastcl::sigmoid_rows_backward": 0,
}


class _Outputs(TorchDispatchMode):
    """Records the sizes of the gradients that the operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (start := GRADIENTS_AT.get(func._schema.name)) is not None:
            self.sizes.append(tuple(x.numel() for x in out[start : start + 5]))
        return out


@pytest.mark.parametrize("workspace", [None, SMALL])
@pytest.mark.parametrize("wanted", ["uv", "u", "v", "s"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_allocated_for_what_needs_no_gradient(
    name: str, wanted: str, workspace: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, finish = [], Accumulator.finish

    def watched(self: Accumulator, *args: Any) -> Any:
        held.append([0 if x is None else x.numel() for x in (self.du, self.dv, self.sums.row_gs)])
        return finish(self, *args)

    monkeypatch.setattr(Accumulator, "finish", watched)
    with _Outputs() as outputs:
        run(name, wanted, backend=backend, workspace=workspace)
    full = {"u": N * D, "v": LOSSES[name][1] * D, "s": 1}
    # A queue's rows have the positive's logit as their bias, which depends on u and the scale.
    bias = N if name == "queue" and wanted != "v" else 0
    right = tuple(full[key] if key in wanted else 0 for key in "uvs")
    assert [sizes[:4] for sizes in outputs.sizes] == [(*right, bias)]
    assert held == [[*right[:2], N if "s" in wanted else 0]]
