"""The kernels in processes of every kind: instruction sets, no extension, forks, threads, spawn."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.kernels.cpu import backend as compiled
from tests.cases import LOSSES, Case
from tests.kernels.test_determinism import KERNELS, Inputs, needs_extension

ROOT = Path(__file__).resolve().parents[2]
SHORT = [c for c in LOSSES if c.name in ("clip", "siglip-ids", "info_nce-queue", "nt_xent")]
BOTH = (torch.float32, torch.bfloat16)


def evaluate(case: Case, call: Any, dtype: torch.dtype, **how: Any) -> dict[str, torch.Tensor]:
    """Loss and gradients on fixed inputs, rounded to `dtype` before anything else."""
    given = case.tensors(seed=5, n=70, d=33, scale=20.0, cone=True)
    leaves = {k: x.to(dtype) if x.is_floating_point() and x.dim() else x for k, x in given.items()}
    if call is case.truth:
        leaves = {k: x.double() if x.is_floating_point() else x for k, x in leaves.items()}
    leaves = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in leaves.items()}
    loss = call(**leaves, **case.options, **how)
    loss.square().sum().backward()
    grads = {k: x.grad for k, x in leaves.items() if x.grad is not None}
    return {"loss": loss.detach()} | grads


def errors(
    cases: list[Case], dtype: torch.dtype, truths: dict[str, Any] | None = None, **how: Any
) -> dict[str, float]:
    """Errors above what arithmetic in float32, and storage in `dtype`, explain."""
    # Of the largest element. With a queue a gradient is the sum of two bfloat16 ones, each larger.
    allowed = 2.0**-17 if dtype == torch.float32 else 2.0**-5
    found = {}
    for case in cases:
        truth = evaluate(case, case.truth, dtype) if truths is None else truths[case.name]
        result = evaluate(case, case.ours, dtype, **how)
        assert result.keys() == truth.keys()
        for name, right in truth.items():
            error = float((result[name].double() - right).abs().max() / right.abs().max())
            if not error <= (2.0**-17 if name == "loss" else allowed):
                found[f"{case.name}: {name}"] = error
    return found


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, which must end within a minute."""
    return subprocess.run(
        [sys.executable, "-c", "import os, sys, warnings, torch\n" + code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- instruction sets --------------------------------------------------------------------------

OF_ISA = """
from fastcl import _C
from tests.kernels.test_process import BOTH, LOSSES, errors
assert _C.isa() == os.environ["FASTCL_CPU_ISA"], _C.isa()
if _C.isa() != "avx512":
    assert not _C.amx_available()
found = [errors(LOSSES, dtype, backend="cpu") for dtype in BOTH]
assert not any(found), found
print("right")
"""


@needs_extension
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set_is_right(isa: str) -> None:
    done = run(OF_ISA, FASTCL_CPU_ISA=isa)
    if "which this processor cannot run" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.stdout.strip() == "right", done.stderr


UNKNOWN_ISA = """
import fastcl
from fastcl import _C
x = torch.eye(4)
losses = [lambda d=d: fastcl.clip_loss(x.to(d), x.to(d), 1.0) for d in (x.dtype, torch.bfloat16)]
for call in [_C.isa, *losses, *losses]:  # not only at the first use
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


@needs_extension
def test_unknown_instruction_set_is_refused() -> None:
    done = run(UNKNOWN_ISA, FASTCL_CPU_ISA="sse")
    expected = "FASTCL_CPU_ISA is 'sse'; it may be plain, avx2 or avx512"
    assert done.stdout.splitlines() == [expected] * 5, done.stderr


# ---- without the extension ---------------------------------------------------------------------

BLOCKED = """
sys.modules["fastcl._C"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import fastcl
    assert not [w for w in said if "fastcl" in str(w.message)], "a warning at import"
    from tests.kernels.test_process import BOTH, SHORT, errors
    found = [errors(SHORT, dtype) for dtype in BOTH for _ in range(2)]
    ours = [w for w in said if "fastcl" in str(w.message)]
assert not any(found), found
assert [w.category for w in ours] == [RuntimeWarning], [str(w.message) for w in ours]
for words in ("compiled CPU kernels are not installed", "portable PyTorch kernels", "slower"):
    assert words in str(ours[0].message), str(ours[0].message)
assert fastcl.available_backends() == ["torch", "reference"]
x = torch.eye(4)
try:
    fastcl.clip_loss(x, x, 1.0, backend="cpu")
except ValueError as error:
    print(error)
"""


def test_without_the_extension() -> None:
    done = run(BLOCKED)
    assert done.returncode == 0, done.stderr
    assert "backend='cpu' cannot be used here" in done.stdout, done.stdout
    assert "fastcl._C" in done.stdout, "the import's own reason is missing"


# ---- fork --------------------------------------------------------------------------------------

# In a child forked after the parent's OpenMP pool has worked, PyTorch itself waits for ever with
# more than one thread: `x @ x` and `x.exp()` alone hang there. So PyTorch gets one thread in the
# child, as its DataLoader gives its workers, and the kernels alone, which ask
# torch.get_num_threads, are told of two in the second child.
FORK = """
import signal, time
import fastcl
from tests.kernels.test_process import BOTH, SHORT, errors, evaluate
truths = {d: {c.name: evaluate(c, c.truth, d) for c in SHORT} for d in BOTH}
big = torch.randn(300, 64)
def found():
    for d in BOTH:
        fastcl.clip_loss(big.to(d), big.to(d), 10.0, backend="cpu")  # several tasks: needs a pool
    return [errors(SHORT, d, truths[d], backend="cpu", workspace=1 << 16) for d in BOTH]
torch.set_num_threads(2)
assert not any(found()), "wrong before the fork"
for threads in (1, 2):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            torch.get_num_threads = lambda: threads
            status = 2 if any(found()) else 0
        finally:
            os._exit(status)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sys.exit(f"the child with {threads} threads hangs")
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"child with {threads} threads: {'raised' if code == 1 else 'wrong'} ({code})"
assert not any(found()), "wrong in the parent after the forks"
print("right")
"""


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_neither_hangs_nor_errs() -> None:
    done = run(FORK)
    assert done.stdout.strip() == "right", done.stderr


# ---- threads and spawn -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_several_threads_at_once(dtype: torch.dtype, backend: str) -> None:
    """Each thread its own loss, all at once and over again: nothing is shared."""
    truths = {case.name: evaluate(case, case.truth, dtype) for case in SHORT}
    start = threading.Barrier(len(SHORT))

    def work(case: Case) -> dict[str, float]:
        start.wait(timeout=30)
        found: dict[str, float] = {}
        for _ in range(10):
            found |= errors([case], dtype, truths, backend=backend, workspace=1 << 16)
        return found

    with ThreadPoolExecutor(len(SHORT)) as pool:
        found = list(pool.map(work, SHORT, timeout=120))
    assert not any(found), found


@needs_extension
@pytest.mark.parametrize("name", KERNELS)
def test_the_gil_is_released(name: str) -> None:
    """While a kernel runs, this thread does too: it ticks well inside of some call."""
    kernels, inputs = compiled.CompiledTiles(compiled._extension), Inputs(torch.float64)
    for _ in range(50):
        spans: list[float] = []

        def timed(spans: list[float] = spans) -> None:
            spans.append(time.perf_counter())
            KERNELS[name](kernels, inputs)
            spans.append(time.perf_counter())

        worker, ticks = threading.Thread(target=timed), []
        worker.start()
        while worker.is_alive():
            ticks.append(time.perf_counter())
        begin, end = spans
        quarter = (end - begin) / 4
        if sum(begin + quarter < t < end - quarter for t in ticks) >= 10:
            return
    pytest.fail("no step of Python was taken within 50 calls")


def _spawned(case: int) -> tuple[int, list[dict[str, float]]]:
    return os.getpid(), [errors([SHORT[case]], dtype) for dtype in BOTH]


def test_spawned_workers() -> None:
    """As a DataLoader with the spawn method starts them."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map_async(_spawned, range(len(SHORT))).get(timeout=90)
    for pid, found in results:
        assert pid != os.getpid()
        assert not any(found), found
