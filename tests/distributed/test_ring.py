"""What the modes promise: who holds and sends what, when, and who computes what."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastcl
from fastcl.distributed import collectives, exchange
from fastcl.kernels import dispatch
from fastcl.kernels.walk import TorchProducts
from tests.distributed.crew import Crew
from tests.distributed.work import unit_rows

CrewOf = Callable[[int], Crew]
CALLS = {
    "clip": (fastcl.clip_loss, {"logit_scale": 10.0}),
    "siglip": (fastcl.siglip_loss, {"logit_scale": 10.0, "logit_bias": -5.0}),
    "nt_xent": (fastcl.nt_xent, {"temperature": 0.5}),
    "info_nce": (fastcl.info_nce, {"temperature": 0.5}),
}


class Patched:
    """Attributes replaced for the time of a call: ranks have no pytest fixture."""

    def __init__(self, *changes: tuple[Any, str, Any]) -> None:
        self._changes = [(where, name, getattr(where, name), new) for where, name, new in changes]

    def __enter__(self) -> None:
        for where, name, _, new in self._changes:
            setattr(where, name, new)

    def __exit__(self, *_: object) -> None:
        for where, name, old, _ in self._changes:
            setattr(where, name, old)


def forward_and_backward(name: str, n: int = 6, d: int = 8, **options: Any) -> None:
    loss, how = CALLS[name]
    rank = dist.get_rank()
    u, v = unit_rows(n, d, 2 * rank), unit_rows(n, d, 2 * rank + 1)
    loss(u, v, **how, group=dist.group.WORLD, backend="torch", **options).backward()


def events(name: str) -> list[str]:
    """In which order a rank starts transfers, computes, and waits."""
    log: list[str] = []
    primitives = dispatch.get("torch")

    def logged(word: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            log.append(word)
            return function(*args, **options)

        return call

    names = ("logsumexp", "logsumexp_backward", "sigmoid_rows", "sigmoid_rows_backward")
    computing = [(primitives, x, logged("compute", getattr(primitives, x))) for x in names]
    starts = logged("start", dist.batch_isend_irecv)
    waits = logged("wait", collectives.Transfer.wait)
    with Patched(
        (dist, "batch_isend_irecv", starts), (collectives.Transfer, "wait", waits), *computing
    ):
        loss, how = CALLS[name]
        rank = dist.get_rank()
        u, v = unit_rows(6, 8, 2 * rank), unit_rows(6, 8, 2 * rank + 1)
        value = loss(u, v, **how, group=dist.group.WORLD, backend="torch", mode="ring")
        log.append("backward")
        value.backward()
    return log


@pytest.mark.parametrize("name", CALLS)
def test_transfers_start_before_the_compute_they_overlap(crew_of: CrewOf, name: str) -> None:
    """Forward and backward; in the backward, gradients travel behind the next block's compute."""
    for log in crew_of(4).run(events, name):
        forward, backward = log[: log.index("backward")], log[log.index("backward") + 1 :]
        hops = 2 if name == "nt_xent" else 3
        assert forward == ["start", "compute", "wait"] * hops + ["compute"]
        step = ["start", "compute", "wait"]
        if hops == 2:
            expected = [*step, "start", "compute", "start", "wait", "compute", "wait", "start"]
        else:
            expected = [*step, "start", "compute", "start", "wait"]
            expected += ["start", "compute", "wait", "start", "wait", "compute", "wait", "start"]
        assert backward == [*expected, "wait"]


def most_blocks_held(name: str) -> int:
    """The most blocks of other ranks' rows that a rank has at any time."""
    held: set[int] = set()
    most = 0
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        nonlocal most
        out = original(self, *size, **options)
        if out.dim() == 2 and out.shape[1] == 32 and out.dtype == torch.float32:
            storage = out.untyped_storage()
            key = storage.data_ptr()
            held.add(key)
            weakref.finalize(out, held.discard, key)
            most = max(most, len(held))
        return out

    rank = dist.get_rank()
    u, v = (unit_rows(6, 32, 2 * rank + k, torch.float32).detach() for k in range(2))
    loss, how = CALLS[name]
    with Patched((torch.Tensor, "new_empty", new_empty)):
        u.requires_grad_()  # and v none: what is allocated is blocks, not their gradients
        loss(u, v, **how, group=dist.group.WORLD, backend="torch", mode="ring")
        gc.collect()
    return most


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CALLS)
def test_a_ring_holds_two_blocks(crew_of: CrewOf, name: str, size: int) -> None:
    hops = size // 2 if name == "nt_xent" else size - 1
    assert crew_of(size).run(most_blocks_held, name) == [min(2, hops)] * size


def similarities(name: str, mode: str) -> tuple[int, int]:
    """How many similarities a rank computes in the forward, and how many in all."""
    count = 0
    original = TorchProducts.similarity

    def similarity(self: Any, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal count
        count += out.numel()
        original(self, a, b, out)

    rank = dist.get_rank()
    u, v = unit_rows(6, 8, 2 * rank), unit_rows(6, 8, 2 * rank + 1)
    loss, how = CALLS[name]
    with Patched((TorchProducts, "similarity", similarity)):
        value = loss(u, v, **how, group=dist.group.WORLD, backend="torch", mode=mode)
        forward = count
        value.backward()
    return forward, count


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("name", CALLS)
def test_each_similarity_is_on_one_rank_once_a_pass(
    crew_of: CrewOf, name: str, mode: str, size: int
) -> None:
    n = 6
    found = crew_of(size).run(similarities, name, mode)
    if name != "nt_xent":
        assert [forward for forward, _ in found] == [n * n * size] * size
    else:  # 2N views: one triangle of the blocks of ranks (tiles on the diagonal are whole)
        views = 2 * n
        assert sum(forward for forward, _ in found) == views**2 * (size + size * (size - 1) // 2)
    once = name in ("siglip", "info_nce") and mode == "gather"  # gradients made in the forward
    assert all(both == (1 if once else 2) * forward for forward, both in found)


@pytest.mark.parametrize("size", range(1, 8))
def test_every_pair_of_ranks_meets_once(size: int) -> None:
    """And at half way round, every pair of rows."""
    counts = tuple(3 + s for s in range(size))
    seen = {}
    for rank in range(size):
        for distance in range(size // 2 + 1):
            rows, cols = exchange.partner(counts, rank, distance)
            for i in range(*rows.indices(counts[rank])):
                for j in range(*cols.rows.indices(counts[cols.rank])):
                    pair = frozenset([(rank, i), (cols.rank, j)])
                    seen[pair] = seen.get(pair, 0) + 1
    between = {pair: k for pair, k in seen.items() if len({rank for rank, _ in pair}) == 2}
    assert set(between.values()) <= {1}
    everyone = [(s, i) for s in range(size) for i in range(counts[s])]
    pairs = {frozenset([a, b]) for a in everyone for b in everyone if a[0] != b[0]}
    assert set(between) == pairs


def test_auto_goes_by_size() -> None:
    from fastcl.distributed.ranks import choose_mode

    def chosen(n: int, ranks: int = 64, grad: bool = True) -> str:
        return choose_mode("auto", n, 768, ranks, torch.bfloat16, grad)

    assert chosen(65_536) == "gather"
    assert chosen(1 << 20) == "ring"
    assert chosen(1 << 20, ranks=1024) == "gather"  # blocks of 1,024 rows hide nothing
    assert chosen(1 << 24, ranks=8192) == "ring"  # 77 GB
    assert chosen(1 << 20, grad=False) == "gather"  # 1.6 GB of rows, and no gradient
    assert choose_mode("ring", 1, 1, 1, torch.float32, True) == "ring"
