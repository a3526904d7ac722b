"""Gradient caching on several ranks: one sum of gradients a step, whatever the chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastcl
from tests.distributed.crew import Crew
from tests.distributed.work import rows_of

CrewOf = Callable[[int], Crew]


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def batch(n: int) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(z0: Tensor, z1: Tensor, log_scale: Tensor, **options: Any) -> Tensor:
    z0, z1 = F.normalize(z0, dim=-1), F.normalize(z1, dim=-1)
    return fastcl.clip_loss(z0, z1, log_scale.exp(), **options)


def alone(counts: tuple[int, ...], shared: bool) -> list[Tensor]:
    first, log_scale = encoder(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    second = first if shared else encoder(1)
    x = batch(sum(counts))
    loss = loss_of(first(x), second(x.flip(1)), log_scale)
    loss.backward()
    modules = [first] if shared else [first, second]
    return [loss.detach(), *(p.grad for m in modules for p in m.parameters()), log_scale.grad]


def together(
    counts: tuple[int, ...], shared: bool, wrapping: str, chunk: int, keep: int, mode: str
) -> tuple[list[Tensor], int]:
    """The same on this rank's rows, and how often gradients of a module were summed."""
    sums = 0

    def count(state, bucket):  # unannotated: DDP compares annotations with its own
        nonlocal sums
        sums += 1
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda f: f.value()[0] / dist.get_world_size())

    modules = [encoder()] if shared else [encoder(), encoder(1)]
    if wrapping == "ddp":
        wrapped: list[Any] = [DistributedDataParallel(m) for m in modules]
        for each in wrapped:
            each.register_comm_hook(None, count)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        wrapped = [fully_shard(m, mesh=mesh) for m in modules]
    log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x, group = batch(sum(counts))[rows_of(counts, dist.get_rank())], dist.group.WORLD
    cached = fastcl.GradCache(
        [wrapped[0], wrapped[-1]], loss_of, chunk, keep=keep, outside=[log_scale], group=group
    )
    loss = cached(x, x.flip(1), log_scale=log_scale, group=group, mode=mode)
    whole = fastcl.distributed.sum_over_ranks(loss, group) / len(counts)
    grads = [p.grad for m in wrapped for p in m.parameters()]
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return [whole, *grads, log_scale.grad], sums


# Every forward of fully_shard is a collective: its ranks need the same number of chunks.
WRAPPED = [
    *(("ddp", counts) for counts in ((5, 12), (3, 3), (7, 0))),
    *(("fsdp2", counts) for counts in ((5, 6), (3, 3))),
]


@pytest.mark.parametrize(("wrapping", "counts"), WRAPPED, ids=str)
@pytest.mark.parametrize("chunk", [3, 20])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_as_one_process_without_a_cache(
    crew_of: CrewOf, shared: bool, wrapping: str, keep: int, chunk: int, counts: tuple[int, ...]
) -> None:
    """With numbers of chunks that differ between ranks, and one encoder for both towers."""
    expected = alone(counts, shared)
    for mode in ("gather", "ring"):
        for found, sums in crew_of(2).run(together, counts, shared, wrapping, chunk, keep, mode):
            assert len(found) == len(expected)
            for x, right in zip(found, expected, strict=True):
                torch.testing.assert_close(x, right, rtol=1e-10, atol=1e-12)
            if wrapping == "ddp":
                assert sums == (1 if shared else 2)  # each module's one bucket, once


def accumulated(counts: tuple[int, ...]) -> list[Tensor]:
    """Two calls in a row: what is averaged is what each call has added."""
    module = DistributedDataParallel(encoder())
    log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x, group = batch(sum(counts))[rows_of(counts, dist.get_rank())], dist.group.WORLD
    cached = fastcl.GradCache([module, module], loss_of, 3, outside=[log_scale], group=group)
    for _ in range(2):
        cached(x, x.flip(1), log_scale=log_scale, group=group)
    return [log_scale.grad]


def test_outside_parameters_accumulate(crew_of: CrewOf) -> None:
    expected = 2 * alone((5, 4), True)[-1]
    for (found,) in crew_of(2).run(accumulated, (5, 4)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def within_a_function(counts: tuple[int, ...]) -> tuple[list[Tensor], int]:
    """DDP is found within what calls it: still one sum, whatever the numbers of chunks."""
    sums = 0

    def count(state, bucket):
        nonlocal sums
        sums += 1
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda f: f.value()[0] / dist.get_world_size())

    module, log_scale = DistributedDataParallel(encoder()), torch.tensor(2.0, dtype=torch.float64)
    module.register_comm_hook(None, count)
    x, group = batch(sum(counts))[rows_of(counts, dist.get_rank())], dist.group.WORLD
    with fastcl.grad_cache(chunk_size=3) as cached:
        z0, z1 = cached(lambda rows: module(rows), x), cached(functools.partial(module), x.flip(1))
        loss_of(z0, z1, log_scale, group=group).backward()
    return [p.grad for p in module.parameters()], sums


def test_a_module_within_a_function(crew_of: CrewOf) -> None:
    expected = alone((9, 3), shared=True)[1:-1]
    for found, sums in crew_of(2).run(within_a_function, (9, 3)):
        assert sums == 1
        for x, right in zip(found, expected, strict=True):
            torch.testing.assert_close(x, right, rtol=1e-10, atol=1e-12)
