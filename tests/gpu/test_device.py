"""Life on a device: no host sync, graphs, streams, several devices, memory, bits, large offsets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcl

pytestmark = pytest.mark.usefixtures("way")  # most embeddings here have 128 dimensions

Loss = Callable[[Tensor, Tensor], Tensor]
SCALE, BIAS = 20.0, -10.0
LOSSES: dict[str, Loss] = {
    "clip": lambda a, b: fastcl.clip_loss(a, b, SCALE, backend="triton"),
    "siglip": lambda a, b: fastcl.siglip_loss(a, b, SCALE, BIAS, backend="triton"),
    "info_nce": lambda a, b: fastcl.info_nce(a, b, temperature=0.05, backend="triton"),
    "info_nce-queue": lambda a, b: fastcl.info_nce(a, b, b.flip(0), backend="triton"),
    "nt_xent": lambda a, b: fastcl.nt_xent(a, b, backend="triton"),
    "clip-ids": lambda a, b: fastcl.clip_loss(
        a, b, SCALE, ids=torch.arange(len(a), device=a.device) // 2, backend="triton"
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def rows(n: int, d: int = 128, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    return F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype).requires_grad_()


def step(loss: Loss, a: Tensor, b: Tensor) -> list[Tensor]:
    value = loss(a, b)
    return [value.detach(), *torch.autograd.grad(value, (a, b))]


@pytest.fixture(autouse=True)
def _syncs_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@every_loss
def test_nothing_waits_for_the_device(loss: Loss) -> None:
    a, b = rows(300), rows(300)
    step(loss, a, b)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step(loss, a, b)


@every_loss
def test_the_same_bits_every_run(loss: Loss) -> None:
    a, b = rows(1000), rows(1000)
    first = step(loss, a, b)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, step(loss, a, b), strict=True))


@every_loss
def test_graphs_capture_and_replay(loss: Loss) -> None:
    a, b = rows(500), rows(500)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(loss, a, b)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, a, b)
    with torch.no_grad():
        a.copy_(rows(500))
        b.copy_(rows(500))
    graph.replay()
    right = step(loss, a, b)
    assert all(torch.equal(x, y) for x, y in zip(captured, right, strict=True))


@every_loss
def test_streams_of_their_own(loss: Loss) -> None:
    inputs = [(rows(700), rows(700)) for _ in range(4)]
    right = [step(loss, a, b) for a, b in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in inputs], []
    for stream, (a, b) in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            found.append(step(loss, a, b))
    torch.cuda.synchronize()
    for x, y in zip(right, found, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@every_loss
def test_a_device_that_is_not_the_current_one(loss: Loss) -> None:
    a, b = rows(300), rows(300)
    other = [x.detach().to("cuda:1").requires_grad_() for x in (a, b)]
    for x, y in zip(step(loss, a, b), step(loss, *other), strict=True):
        assert y.device.index == 1
        assert torch.equal(x, y.to("cuda:0"))


def test_another_n_compiles_nothing() -> None:
    from fastcl.kernels.triton import owner, softmax

    kernels = softmax.statistics, softmax.gradient, owner.owned_gradient
    step(LOSSES["clip"], rows(300), rows(300))
    before = [_variants(kernel) for kernel in kernels]
    for n in (301, 302, 304, 1000, 1024):
        step(LOSSES["clip"], rows(n), rows(n))
    assert [_variants(kernel) for kernel in kernels] == before


def _variants(kernel: object) -> int:
    return sum(len(cache[0]) for cache in kernel.device_caches.values())  # type: ignore[attr-defined]


@every_loss
@pytest.mark.parametrize("d", [128, 256])
def test_memory_grows_with_n(loss: Loss, d: int) -> None:
    """Beside inputs and gradients: the workspace, float32 accumulators of one tower, vectors."""
    n = 16384
    a, b = rows(n, d), rows(n, d)
    step(loss, a, b)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(loss, a, b)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    accumulators = 2 * n * d * 4  # nt_xent has one tower of 2N rows
    assert extra <= (256 << 20) + accumulators + 2 * n * d * 2 + (64 << 20), extra


def test_offsets_past_two_to_the_31() -> None:
    """4.2 million rows of 512: the last one lies past 2^31 elements."""
    u = torch.zeros(4_200_000, 512, dtype=torch.bfloat16, device="cuda")
    v = F.normalize(torch.randn(8, 512, device="cuda"), dim=1).bfloat16()
    u[-1] = v[3]
    found = fastcl.similarity_logsumexp(u, v, scale=10.0, backend="triton")[-1]
    right = torch.logsumexp(10 * u[-1].double() @ v.double().T, dim=0)
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)
    del u


def test_compile_is_one_graph_for_every_n() -> None:
    compiled = torch.compile(LOSSES["clip"], fullgraph=True, dynamic=True)
    for n in (200, 333, 512):
        a, b = rows(n), rows(n)
        torch.testing.assert_close(step(compiled, a, b), step(LOSSES["clip"], a, b))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str) -> None:
    script = (
        "import torch, fastcl\n"
        "a, b = (torch.randn(n, 100, device='cuda', dtype=torch.bfloat16, requires_grad=True)"
        " for n in (257, 257))\n"
        "fastcl.clip_loss(a, b, 0.1, backend='triton').backward()\n"
        "fastcl.siglip_loss(a, b, 0.1, -1.0, backend='triton').backward()\n"
        "torch.cuda.synchronize()\n"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    done = subprocess.run(
        [*command, sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
