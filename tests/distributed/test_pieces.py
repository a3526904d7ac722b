"""Gathered rows, counts and sums, as queues and clustering will use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastcl
from fastcl.distributed.meeting import _differences
from fastcl.distributed.statistics import merge
from fastcl.kernels.tiles import Running
from tests.distributed.crew import Crew
from tests.distributed.work import rows_of

CrewOf = Callable[[int], Crew]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def data(dtype: torch.dtype) -> Tensor:
    return (10 * torch.randn(9, 3, 2, generator=torch.Generator().manual_seed(0))).to(dtype)


def gathered(counts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    rows = rows_of(counts, dist.get_rank())
    return fastcl.distributed.gather_rows(data(dtype)[rows], dist.group.WORLD)


@pytest.mark.parametrize("counts", [(3, 3, 3), (4, 0, 5), (0, 0, 9), (2, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_rows(crew_of: CrewOf, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    for found in crew_of(len(counts)).run(gathered, counts, dtype):
        assert torch.equal(found, data(dtype))


def gathered_gradient(
    counts: tuple[int, ...], dtype: torch.dtype, reduce_dtype: torch.dtype | None
) -> Tensor:
    """Rank r's loss is (r + 1) <weights, all rows>."""
    mine = data(dtype)[rows_of(counts, dist.get_rank())].clone().requires_grad_()
    group = dist.group.WORLD
    rows = fastcl.distributed.gather_rows(mine, group, reduce_dtype=reduce_dtype)
    (rows * data(dtype).flip(0) * (dist.get_rank() + 1)).sum().backward()
    return mine.grad


@pytest.mark.parametrize("counts", [(3, 3, 3), (4, 0, 5)], ids=str)
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_its_gradient_is_summed_over_ranks(
    crew_of: CrewOf, dtype: torch.dtype, reduce_dtype: torch.dtype | None, counts: tuple[int, ...]
) -> None:
    found = torch.cat(crew_of(3).run(gathered_gradient, counts, dtype, reduce_dtype))
    assert found.dtype == dtype
    weights = data(dtype).flip(0)
    parts = [weights * (rank + 1) for rank in range(3)]  # in the rows' dtype, as each rank has it
    if reduce_dtype is not None:
        parts = [part.to(reduce_dtype) for part in parts]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(found, torch.stack([part.to(wide) for part in parts]).sum(dim=0).to(dtype))


def gather_what_differs() -> None:
    width = 3 + dist.get_rank()
    fastcl.distributed.gather_rows(torch.zeros(2, width), dist.group.WORLD)


def test_what_differs_is_refused(crew_of: CrewOf) -> None:
    for outcome in crew_of(2).outcomes(gather_what_differs):
        assert "RanksDisagree: gather_rows" in str(outcome.error)  # type: ignore[union-attr]


def counted(rows: Any) -> Any:
    return fastcl.distributed.row_counts(rows[dist.get_rank()], dist.group.WORLD)


def test_row_counts(crew_of: CrewOf) -> None:
    assert crew_of(4).run(counted, (3, 0, 5, 1)) == [(3, 0, 5, 1)] * 4
    for outcome in crew_of(2).outcomes(counted, (3, -1)):
        assert "rows is -1; expected a number of rows" in str(outcome.error)  # type: ignore[union-attr]


def summed() -> Tensor:
    return fastcl.distributed.sum_over_ranks(
        torch.tensor([1.0, 2.0]) * (dist.get_rank() + 1), dist.group.WORLD
    )


def test_sum_over_ranks(crew_of: CrewOf) -> None:
    for found in crew_of(4).run(summed):
        assert torch.equal(found, torch.tensor([10.0, 20.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merged_logsumexps(dtype: torch.dtype) -> None:
    """Of any parts, some of them empty: the logsumexp of everything."""
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(5, 12, generator=generator, dtype=torch.float64).to(dtype)
    logits[1] = -torch.inf
    logits[2, :4] = -torch.inf
    parts = []
    for part in logits.split([4, 1, 7], dim=1):
        top = part.amax(dim=1)
        safe = torch.where(top == -torch.inf, torch.zeros_like(top), top)
        parts.append(Running(top, torch.exp(part - safe[:, None]).sum(dim=1)))
    found = merge(parts)
    expected = torch.logsumexp(logits.double(), dim=1)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.log(), expected, rtol=tolerance, atol=tolerance)
    nan = Running(parts[0].max, torch.full_like(parts[0].sum, torch.nan))
    assert merge([nan, *parts[1:]]).log().isnan().all()


def test_differences_are_told_by_rank() -> None:
    texts = ["loss=a\nD=8", "loss=a\nD=8\nids=True", "loss=a\nD=9"]
    assert _differences(texts) == (
        "D is 8 on ranks 0, 1 and 9 on rank 2; ids is missing on ranks 0, 2 and True on rank 1"
    )
