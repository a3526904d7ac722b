"""Peak memory of a rank, as the kernel counts it: what the modes hold of the other tower."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastcl
from tests.distributed.crew import Crew

MIB = 1 << 20
N, D = 4096, 1024  # of each rank: a block is 16 MiB
BLOCK = 4 * N * D
WORKSPACE = 4 * MIB
FIXED = 8 * MIB  # per-thread scratch of a BLAS, buffers of sockets, pages

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs here"
)


def status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def extra(mode: str, n: int, backward: bool) -> int:
    """Peak above the inputs (and the gradients that stay)."""
    group = dist.group.WORLD
    peaks = []
    for rows in (512, n):  # fewer first, so that what is made once is there
        u, v = (torch.randn(rows, D).mul_(D**-0.5).requires_grad_(backward) for _ in range(2))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        how = {"group": group, "mode": mode, "workspace": WORKSPACE}
        loss = fastcl.clip_loss(u, v, 10.0, **how)
        if backward:
            loss.backward()
        peaks.append(status("VmHWM") - before)
    return peaks[-1] - (2 * u.nbytes if backward else 0)


def test_a_ring_holds_two_blocks_and_gather_all_of_them(
    own_crew: Callable[[int, float], Crew],
) -> None:
    """Of the other tower, in the forward: statistics are vectors, the rest is the workspace."""
    size = 4
    vectors = 16 * 8 * size * N
    crew = own_crew(size, 60.0)
    ring = max(crew.run(extra, "ring", N, False))
    gather = min(crew.run(extra, "gather", N, False))
    assert ring <= 2 * BLOCK + WORKSPACE + vectors + FIXED
    assert gather >= size * BLOCK > ring


@pytest.mark.slow
def test_memory_of_a_rings_step_does_not_grow_with_the_ranks(
    own_crew: Callable[[int, float], Crew],
) -> None:
    """Forward and backward: blocks of rows and of their gradients, however many ranks there are."""
    peaks = [max(own_crew(size, 60.0).run(extra, "ring", N, True)) for size in (3, 4)]
    vectors = 16 * 8 * N
    assert peaks[1] <= peaks[0] + vectors + FIXED
    assert peaks[1] <= 8 * BLOCK + WORKSPACE + 4 * vectors + FIXED
