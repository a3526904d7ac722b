"""Losses across ranks on NCCL: one rank on one device, and as many as there are devices."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastcl

CALLS: dict[str, Any] = {
    "clip": lambda u, v, **how: fastcl.clip_loss(u, v, 20.0, **how),
    "siglip": lambda u, v, **how: fastcl.siglip_loss(u, v, 20.0, -10.0, **how),
    "info_nce": lambda u, v, **how: fastcl.info_nce(u, v, temperature=0.05, **how),
    "nt_xent": lambda u, v, **how: fastcl.nt_xent(u, v, temperature=0.1, **how),
}
every_loss = pytest.mark.parametrize("name", CALLS)
every_mode = pytest.mark.parametrize("mode", ["gather", "ring"])


def join(rank: int, size: int, store: str) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=size, device_id=device
    )


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    join(0, 1, str(tmp_path_factory.mktemp("nccl") / "store"))
    yield dist.group.WORLD
    dist.destroy_process_group()


def rows(n: int, dtype: torch.dtype, seed: int, device: str = "cuda") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, 96, generator=generator), dim=1)
    return x.to(device, dtype).requires_grad_()


def step(name: str, u: Tensor, v: Tensor, **how: Any) -> list[Tensor]:
    loss = CALLS[name](u, v, backend="triton", **how)
    return [loss.detach(), *torch.autograd.grad(loss, (u, v))]


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    """A few units of the last place of the largest: the tiles are cut differently."""
    for x, right in zip(found, expected, strict=True):
        tolerance = 8 * torch.finfo(right.dtype).eps * right.abs().max().item()
        torch.testing.assert_close(x, right, rtol=0, atol=tolerance)


@every_loss
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_rank(group: Any, name: str, mode: str, dtype: torch.dtype) -> None:
    u, v = rows(700, dtype, 0), rows(700, dtype, 1)
    check(step(name, u, v, group=group, mode=mode), step(name, u, v))


@every_loss
@every_mode
def test_nothing_waits_for_the_device(group: Any, name: str, mode: str) -> None:
    """The ranks talk on the host, and not of what is on the device."""
    u, v = rows(300, torch.bfloat16, 0), rows(300, torch.bfloat16, 1)
    step(name, u, v, group=group, mode=mode)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(name, u, v, group=group, mode=mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gathered_rows_and_their_gradient(group: Any) -> None:
    """That of a sum is of ones that take no memory, and NCCL is given memory."""
    mine = torch.randn(5, 3, device="cuda", requires_grad=True)
    rows = fastcl.distributed.gather_rows(mine, group)
    assert torch.equal(rows, mine)
    rows.sum().backward()
    assert torch.equal(mine.grad, torch.ones_like(mine))


def one_of_several(rank: int, size: int, store: str, counts: list[int], out: str) -> None:
    join(rank, size, store)
    start = sum(counts[:rank])
    mine = slice(start, start + counts[rank])
    found = {}
    for name in CALLS:
        for mode in ("gather", "ring"):
            for dtype in (torch.float32, torch.bfloat16):
                u, v = (
                    rows(sum(counts), dtype, s, f"cuda:{rank}")[mine].detach().requires_grad_()
                    for s in (0, 1)
                )
                how = {"group": dist.group.WORLD, "mode": mode}
                found[name, mode, dtype] = [x.cpu() for x in step(name, u, v, **how)]
    torch.save(found, f"{out}/{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("even", [True, False])
def test_several_ranks(even: bool) -> None:
    size = min(4, torch.cuda.device_count())
    counts = [200 if even else 150 + 70 * rank for rank in range(size)]
    with tempfile.TemporaryDirectory() as out:
        arguments = (size, str(Path(out) / "store"), counts, out)
        torch.multiprocessing.spawn(one_of_several, arguments, nprocs=size)
        parts = [torch.load(f"{out}/{rank}", weights_only=True) for rank in range(size)]
    for name, mode, dtype in parts[0]:
        losses, du, dv = zip(*(part[name, mode, dtype] for part in parts), strict=True)
        found = [torch.stack(losses).mean(), torch.cat(du) / size, torch.cat(dv) / size]
        u, v = rows(sum(counts), dtype, 0), rows(sum(counts), dtype, 1)
        check(found, [x.cpu() for x in step(name, u, v)])
