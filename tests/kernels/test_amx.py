"""bfloat16 products on AMX against float64, and what the losses gain by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.kernels.cpu import backend as compiled
from fastcl.kernels.cpu.amx import AmxProducts
from fastcl.kernels.walk import Total
from tests.cases import LOSSES, Case

pytestmark = pytest.mark.skipif(
    compiled._extension is None or not compiled._extension.amx_available(),
    reason="this processor, or this build, has no AMX",
)
RAGGED = (1, 3, 15, 16, 17, 31, 32, 33, 100)
GRADIENT_ERROR = 2.0**-15  # of sum |g| |x|; G in one bfloat16 would give 2^-9


def embeddings(rows: int, d: int) -> Tensor:
    return torch.randn(rows, d).bfloat16()


def products() -> AmxProducts:
    return AmxProducts(compiled._extension)


def assert_similarity(made: Tensor, u: Tensor, v: Tensor) -> None:
    """Sums of exact products in float32: an error of D roundings, of sum |u| |v|."""
    u, v = u.double(), v.double()
    allowed = (u.shape[1] + 2) * 2.0**-24 * (u.abs() @ v.abs().T)
    error = (made.double() - u @ v.T).abs()
    assert (error <= allowed).all(), f"{error.max():.3g} at {made.shape}, D={u.shape[1]}"


def assert_gradient(made: Tensor, start: Tensor, g: Tensor, x: Tensor) -> None:
    """made = start + g x within the bound; each term added may round what it is added to."""
    g, x, start = g.double(), x.double(), start.double()
    allowed = GRADIENT_ERROR * (g.abs() @ x.abs()) + 2 * g.shape[1] * 2.0**-24 * start.abs()
    error = (made.double() - (start + g @ x)).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} of the bound, {made.shape}"


def begun(x: Tensor) -> Total:
    return Total(x, empty=False)


def check_products(amx: AmxProducts, u: Tensor, v: Tensor) -> None:
    """All products of one tile; what they add to is not zero, what they overwrite not finite."""
    rows, cols, d = len(u), len(v), u.shape[1]
    a, b, s = amx.rows(u), amx.cols(v), torch.full((rows, cols), torch.nan)
    amx.similarity(a, b, s)
    assert_similarity(s, u, v)
    g = torch.randn(rows, cols) * torch.logspace(-6, 2, cols)
    du, dv = torch.randn(rows, d), torch.randn(cols, d)
    da, db = du.clone(), dv.clone()
    amx.gradients(g, a, b, begun(da), begun(db))
    assert_gradient(da, du, g, v)
    assert_gradient(db, dv, g.T, u)
    first = Total(torch.full_like(du, torch.nan)), Total(torch.full_like(dv, torch.nan))
    amx.gradients(g, a, b, *first)
    assert_gradient(first[0].sum, torch.zeros_like(du), g, v)
    assert_gradient(first[1].sum, torch.zeros_like(dv), g.T, u)


@pytest.mark.parametrize("d", RAGGED)
def test_products_of_ragged_shapes(d: int) -> None:
    for rows in RAGGED:
        for cols in RAGGED:
            check_products(products(), embeddings(rows, d), embeddings(cols, d))


def test_products_of_several_tasks() -> None:
    check_products(products(), embeddings(530, 70), embeddings(300, 70))


def layouts(rows: int, d: int) -> dict[str, Tensor]:
    """The same number of rows, lying in memory in every way that a chunk may."""
    return {
        "rows of a wider matrix": embeddings(rows, d + 13)[:, 5 : 5 + d],
        "every other row": embeddings(2 * rows, d)[::2],
        "transposed": embeddings(d, rows).T,
        "every other column": embeddings(rows, 2 * d)[:, ::2],
        "one row, expanded": embeddings(1, d).expand(rows, d),
        "one column, expanded": embeddings(rows, 1).expand(rows, d),
        "one number, expanded": embeddings(1, 1).expand(rows, d),
    }


@pytest.mark.parametrize("layout", layouts(1, 1))
def test_products_of_any_layout(layout: str) -> None:
    for rows, cols, d in ((33, 50, 17), (100, 3, 64), (1, 40, 33)):
        check_products(products(), layouts(rows, d)[layout], embeddings(cols, d))
        check_products(products(), embeddings(cols, d), layouts(rows, d)[layout])


def test_outputs_and_g_within_wider_matrices() -> None:
    rows, cols, d = 45, 70, 37
    u, v, amx = embeddings(rows, d), embeddings(cols, d), products()
    a, b = amx.rows(u), amx.cols(v)

    def inside(x: Tensor) -> tuple[Tensor, Tensor]:
        around = torch.full((len(x) + 2, x.shape[1] + 9), 7.0)
        view = around[1:-1, 4:-5]
        view.copy_(x)
        return around, view

    def frame(around: Tensor) -> Tensor:
        return torch.cat([around[0], around[-1], around[:, :4].ravel(), around[:, -5:].ravel()])

    g = inside(torch.randn(rows, cols))[1]
    s_around, s = inside(torch.zeros(rows, cols))
    du, dv = torch.randn(rows, d), torch.randn(cols, d)
    (da_around, da), (db_around, db) = inside(du), inside(dv)
    amx.similarity(a, b, s)
    amx.gradients(g, a, b, begun(da), begun(db))
    assert_similarity(s, u, v)
    assert_gradient(da, du, g, v)
    assert_gradient(db, dv, g.T, u)
    for around in (s_around, da_around, db_around):
        assert (frame(around) == 7).all(), "written outside of the result"


@pytest.mark.parametrize("wanted", ["da", "db"])
def test_one_gradient_alone(wanted: str) -> None:
    u, v, g, amx = embeddings(40, 20), embeddings(50, 20), torch.randn(40, 50), products()
    a, b = amx.rows(u), amx.cols(v)
    out = torch.zeros(40 if wanted == "da" else 50, 20)
    total = begun(out)
    amx.gradients(g, a, b, *((total, None) if wanted == "da" else (None, total)))
    assert_gradient(out, torch.zeros_like(out), *((g, v) if wanted == "da" else (g.T, u)))


def test_buffers_hold_nothing_of_earlier_chunks() -> None:
    """Chunks shrink at the end of a walk: what lay in the padding was NaN before."""
    amx, d = products(), 40
    nan = torch.full((100, d), torch.nan).bfloat16()
    for rows, cols in ((100, 64), (17, 33), (100, 100), (1, 3), (64, 97), (31, 1)):
        a, b = amx.rows(nan), amx.cols(nan)
        amx.similarity(a, b, torch.empty(100, 100))
        trash = begun(torch.zeros(100, d)), begun(torch.zeros(100, d))
        amx.gradients(torch.full((100, 100), torch.nan), a, b, *trash)
        check_products(amx, embeddings(rows, d), embeddings(cols, d))


def test_accumulation_over_many_tiles() -> None:
    amx, tiles = products(), [(embeddings(48, 24), torch.randn(33, 48)) for _ in range(40)]
    u = embeddings(33, 24)
    a, da = amx.rows(u), Total(torch.full((33, 24), torch.nan))
    for v, g in tiles:
        amx.gradients(g, a, amx.cols(v), da, None)
    g, v = torch.cat([g for _, g in tiles], dim=1), torch.cat([v for v, _ in tiles])
    assert_gradient(da.sum, torch.zeros_like(da.sum), g, v)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("rows", "cols", "d"), [(33, 20, 17), (64, 64, 64), (100, 37, 3)])
def test_nan_and_infinity_propagate(value: float, rows: int, cols: int, d: int) -> None:
    """Into all that depends on them, and into nothing else."""
    u, v, g = embeddings(rows, d), embeddings(cols, d), torch.randn(rows, cols)
    clean_u, clean_g = u.clone(), g.clone()
    u[rows // 2, d // 2] = value
    g[rows - 1, cols // 3] = value

    amx, s = products(), torch.empty(rows, cols)
    a, b = amx.rows(u), amx.cols(v)
    amx.similarity(a, b, s)
    torch.testing.assert_close(
        s.double(), u.double() @ v.double().T, rtol=0, atol=1e-4, equal_nan=True
    )
    assert not s[rows // 2].isfinite().any()
    da, db = torch.zeros(rows, d), torch.zeros(cols, d)
    amx.gradients(g, amx.rows(clean_u), b, begun(da), begun(db))
    assert torch.equal(da.isfinite(), (g.double() @ v.double()).isfinite())
    assert torch.equal(db.isfinite(), (g.double().T @ clean_u.double()).isfinite())
    assert (~da.isfinite()).sum() == (~db.isfinite()).sum() == d
    db.zero_()
    amx.gradients(clean_g, amx.rows(u), b, None, begun(db))
    assert torch.equal(db.isfinite(), (clean_g.double().T @ u.double()).isfinite())
    assert (~db.isfinite()).sum() == cols


# ---- what the losses gain ----------------------------------------------------------------------


def worst_errors(function: Any, case: Case, scale: float, **how: Any) -> dict[str, float]:
    """Largest errors of loss and gradients over three draws, float64 on the same numbers right."""
    worst: dict[str, float] = {}
    for seed in range(3):
        given = {
            name: x.float() if x.dim() == 0 else x.bfloat16()
            for name, x in case.tensors(seed, n=150, d=48, scale=scale, cone=True).items()
        }
        results = []
        for call, dtype, options in ((function, None, how), (case.truth, torch.float64, {})):
            leaves = {k: x.to(dtype or x.dtype, copy=True) for k, x in given.items()}
            loss = call(**{k: x.requires_grad_() for k, x in leaves.items()}, **options)
            loss.backward()
            results.append({"loss": loss.detach()} | {k: x.grad for k, x in leaves.items()})
        for name, right in results[1].items():
            error = float((results[0][name].double() - right).abs().max())
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "nt_xent"])
def test_losses_are_more_exact_than_eager(name: str, scale: float) -> None:
    (case,) = [case for case in LOSSES if case.name == name]
    ours = worst_errors(case.ours, case, scale, backend="cpu")
    theirs = worst_errors(case.eager, case, scale)
    assert len(ours) >= 4
    for tensor, error in ours.items():
        assert error < theirs[tensor], f"{tensor}: {error:.3g}, eager {theirs[tensor]:.3g}"
