"""The normalising kernels in Triton's interpreter, beside PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcl.kernels import normalize as plain
from fastcl.similarity import ops
from tests.cases import NORMALIZED, Case
from tests.functional.test_normalize import ROWS
from tests.rule import check_rule

pytestmark = pytest.mark.interpreter


def _both_ways(x: Tensor, grad: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(y, norm, dx) of the kernels, and of plain PyTorch."""
    y, norm = ops.normalize(x, "triton")
    right = plain.normalize(x)
    dx = ops.normalize_backward(grad, x, norm, "triton")
    return (y, norm, dx), (*right, plain.normalize_backward(grad, x, norm))


@pytest.mark.parametrize("shape", [(1, 1), (70, 20), (3, 1024), (65, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_any_length(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    for made, right in zip(*_both_ways(x, grad), strict=True):
        assert made.dtype == right.dtype
        torch.testing.assert_close(made, right)


def test_zero_tiny_and_huge_rows() -> None:
    for made, right in zip(*_both_ways(ROWS, torch.ones_like(ROWS)), strict=True):
        torch.testing.assert_close(made, right)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_row(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    for made, right in zip(*_both_ways(x, torch.ones_like(x)), strict=True):
        assert torch.equal(made.isfinite(), right.isfinite())


def test_rows_of_a_wider_matrix_and_transposed_ones() -> None:
    wide = torch.randn(9, 40)
    for x in (wide[:, 3:20], wide.T):
        grad = torch.randn(x.T.shape).T
        for made, right in zip(*_both_ways(x, grad), strict=True):
            torch.testing.assert_close(made, right)


# Without bfloat16: the interpreter cuts its last bits off where hardware rounds.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", NORMALIZED, ids=str)
def test_losses_by_the_rule(case: Case, dtype: torch.dtype) -> None:
    draws = [case.tensors(seed, 33, 20, scale=10.0, cone=True) for seed in range(6)]
    check_rule(case, dtype, draws, {"backend": "triton"})
