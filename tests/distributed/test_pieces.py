"""Gathered rows, counts and sums, as queues and clustering will use them."""

from __future__ import annotations

import functools
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
from tests.distributed.work import rows_of, unit_rows

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


def gathered_labels(counts: tuple[int, ...]) -> Tensor:
    labels = torch.arange(9)[rows_of(counts, dist.get_rank())]
    return fastcl.distributed.gather_rows(labels, dist.group.WORLD)


@pytest.mark.parametrize("counts", [(3, 3, 3), (4, 0, 5)], ids=str)
def test_rows_may_be_numbers(crew_of: CrewOf, counts: tuple[int, ...]) -> None:
    for found in crew_of(3).run(gathered_labels, counts):
        assert torch.equal(found, torch.arange(9))


def negatives_of_all(counts: tuple[int, ...], **options: Any) -> tuple[float, Tensor]:
    """Each rank's own hard negatives are everyone's; a rank may have no queries."""
    rank, group = dist.get_rank(), dist.group.WORLD
    rows = rows_of(counts, rank)
    query, key = (unit_rows(7, seed=s).detach()[rows] for s in (0, 1))
    own = unit_rows(6, seed=2).detach()[2 * rank : 2 * rank + 2].requires_grad_()
    keys = fastcl.distributed.gather_rows(own, group)
    loss = fastcl.info_nce(query, key, keys, temperature=0.1, group=group, **options)
    loss.backward()
    assert own.grad is not None
    return loss.item(), own.grad


@pytest.mark.parametrize("counts", [(3, 2, 2), (4, 0, 3)], ids=str)
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_hard_negatives_of_all_ranks(
    crew_of: CrewOf, mode: str, in_batch: bool, counts: tuple[int, ...]
) -> None:
    query, key = (unit_rows(7, seed=s).detach() for s in (0, 1))
    keys = unit_rows(6, seed=2)
    expected = fastcl.info_nce(query, key, keys, temperature=0.1, in_batch=in_batch)
    expected.backward()
    losses, grads = zip(
        *crew_of(3).run(functools.partial(negatives_of_all, mode=mode, in_batch=in_batch), counts),
        strict=True,
    )
    assert sum(losses) / 3 == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(grads) / 3, keys.grad, rtol=1e-10, atol=1e-10)


def gradient_of_a_sum() -> Tensor:
    """Of ones that take no memory."""
    mine = torch.randn(2, 3, requires_grad=True)
    fastcl.distributed.gather_rows(mine, dist.group.WORLD).sum().backward()
    return mine.grad


def test_a_gradient_without_memory(crew_of: CrewOf) -> None:
    for found in crew_of(3).run(gradient_of_a_sum):
        assert torch.equal(found, torch.full((2, 3), 3.0))


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


def summed_with_other_strides() -> Tensor:
    x = torch.arange(6.0).reshape(2, 3)
    x = x if dist.get_rank() == 0 else x.t().contiguous().t()
    return fastcl.distributed.sum_over_ranks(x, dist.group.WORLD)


def test_strides_may_differ(crew_of: CrewOf) -> None:
    for found in crew_of(2).run(summed_with_other_strides):
        assert torch.equal(found, 2 * torch.arange(6.0).reshape(2, 3))


def merged_over_ranks() -> tuple[Tensor, Tensor]:
    logits = 50 * torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    logits[:, :, 1] = -torch.inf
    logits[1, 2:, 0] = -torch.inf
    own = torch.logsumexp(logits[:, dist.get_rank()], dim=0)
    found = fastcl.distributed.logsumexp_over_ranks(own, dist.group.WORLD)
    return found, torch.logsumexp(logits[:, : dist.get_world_size()].reshape(-1, 3), dim=0)


def test_logsumexp_over_ranks(crew_of: CrewOf) -> None:
    for found, expected in crew_of(4).run(merged_over_ranks):
        torch.testing.assert_close(found, expected)


def under_another_default_device() -> bool:
    with torch.device("meta"):
        u = torch.ones(2, 2, device="cpu")
        return bool(fastcl.info_nce(u, u, group=dist.group.WORLD).isfinite())


def test_the_default_device_may_be_another(crew_of: CrewOf) -> None:
    assert crew_of(2).run(under_another_default_device) == [True, True]


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
