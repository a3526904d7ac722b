"""The kernels' machine code, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from fastcl.kernels.triton.plan import OWNED_DIM
from fastcl.kernels.triton.support import interpreted
from tests.kernels.triton.compiled import (
    AMD,
    MAIN,
    NVIDIA,
    OWNER_ROUTES,
    ROUTES,
    SHARED,
    Compiled,
    compiled,
    grid,
    read_table,
    table,
)

pytestmark = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 compiles nothing")
TABLE = Path(__file__).with_name("compiled.csv")


def _check(made: Compiled, arch: int | str) -> None:
    assert made.shared <= SHARED[arch], made
    assert made.spills == 0, made


@pytest.mark.parametrize("route", MAIN)
@pytest.mark.parametrize("arch", [*NVIDIA, AMD])
def test_main_routes_fit_every_architecture(arch: int | str, route: str) -> None:
    _check(compiled(route, arch, "bf16", 768), arch)


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in OWNER_ROUTES])
def test_no_route_spills_on_hopper(route: str) -> None:
    _check(compiled(route, 90, "bf16", 768), 90)


@pytest.mark.parametrize("route", OWNER_ROUTES)
@pytest.mark.parametrize("arch", NVIDIA)
def test_routes_of_small_embeddings_fit_every_architecture(arch: int | str, route: str) -> None:
    _check(compiled(route, arch, "bf16", OWNED_DIM[2]), arch)


@pytest.mark.parametrize("route", [route for route in OWNER_ROUTES if "owner" in route])
@pytest.mark.parametrize("dim", [64, OWNED_DIM[2]])
def test_owners_multiply_and_copy_as_they_should(dim: int, route: str) -> None:
    made = compiled(route, 90, "bf16", dim)
    assert made.matrix == "HGMMA", made
    assert made.copies > 0, made


@pytest.mark.parametrize("route", MAIN)
@pytest.mark.parametrize("dim", [64, 768])
def test_hopper_multiplies_and_copies_as_it_should(dim: int, route: str) -> None:
    made = compiled(route, 90, "bf16", dim)
    assert made.matrix == "HGMMA", made
    assert made.copies > 0, made


@pytest.mark.slow
@pytest.mark.parametrize("route", [route for route in ROUTES if route not in OWNER_ROUTES])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("dim", [1, 7, 100, 512, 1152, 4096])
def test_every_route_and_dimension(dim: int, dtype: str, route: str) -> None:
    for arch in (80, 90):
        _check(compiled(route, arch, dtype, dim), arch)


def test_the_committed_table_is_of_these_kernels() -> None:
    """To the digit where Triton is the version that made it; compiled.py says how to renew it."""
    version, rows = read_table(TABLE.read_text())
    assert [(r["route"], r["arch"], r["dtype"], r["dim"]) for r in rows] == [
        tuple(map(str, case)) for case in grid()
    ]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, this is {triton.__version__}")
    made = [compiled(*case) for case in grid()]
    assert table(made) == TABLE.read_text()
