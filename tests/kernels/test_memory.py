"""Peak memory of a process: what docs/architecture.md promises under "What it costs".

The kernel counts (VmHWM), not Python: operators allocate where no tensor of Python's shows it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcl
from fastcl.kernels.cpu.backend import missing_extension
from tests import eager

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
D = 128
WORKSPACE = 4 * MIB
VECTORS = 16  # of float64 and length N, in both towers together: statistics, pairs, their autograd
FIXED = 2 * MIB  # a BLAS's packed panels, per-thread scratch, page granularity

pytestmark = [
    pytest.mark.skipif(
        not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs here"
    ),
    pytest.mark.skipif(missing_extension() is not None, reason="no compiled kernels"),
]


# ---- the measured process ----------------------------------------------------------------------


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _loss(name: str, u: torch.Tensor, v: torch.Tensor, eagerly: bool, **how: Any) -> torch.Tensor:
    scale = torch.tensor(10.0, requires_grad=True)
    library: Any = eager if eagerly else fastcl
    if name == "clip_loss":
        return library.clip_loss(u, v, scale, **how)
    if name == "siglip_loss":
        bias = torch.tensor(-10.0, requires_grad=True)
        return library.siglip_loss(u, v, scale, bias, **how)
    return getattr(library, name)(u, v, temperature=1 / scale, **how)


def _extra(name: str, dtype: torch.dtype, n: int, d: int, eagerly: bool, **how: Any) -> int:
    """Peak of loss and backward above the inputs and the gradients that stay."""
    u, v = (torch.randn(n, d).mul_(d**-0.5).to(dtype).requires_grad_() for _ in range(2))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    _loss(name, u, v, eagerly, **how).backward()
    return _status("VmHWM") - before - 2 * u.nbytes


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    d, eagerly = job["d"], job["eagerly"]
    how = {} if eagerly else {"backend": "cpu", "workspace": job["workspace"]}
    found = {}
    for name in job["dtypes"]:
        dtype = getattr(torch, name)
        _extra(job["loss"], dtype, 96, d, eagerly, **how)  # libraries load and set themselves up
        found[name] = [_extra(job["loss"], dtype, n, d, eagerly, **how) for n in job["sizes"]]
    print(json.dumps(found))


# ---- the tests ---------------------------------------------------------------------------------


def peaks(loss: str, dtypes: list[str], sizes: list[int], **other: Any) -> dict[str, list[int]]:
    """Extra bytes at each size, by dtype, in one fresh process."""
    job = {"loss": loss, "dtypes": dtypes, "sizes": sizes, "d": D, "workspace": WORKSPACE}
    job |= {"eagerly": False, "threads": 1} | other
    # Freed blocks go back at once, so that the peak is what was in use and not what was kept.
    back = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    back |= {"MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_memory", json.dumps(job)],
        env=os.environ | back | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    extra: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    for dtype, found in extra.items():
        print(loss, dtype, {n: f"{x / MIB:.2f} MiB" for n, x in zip(sizes, found, strict=True)})
    return extra


def contract(name: str, dtype: str, n: int) -> int:
    """What architecture.md allows, in bytes."""
    one = n * D * (4 if dtype == "float32" else 2)  # a gradient of one tower, as it is returned
    held = {
        "clip_loss": 0,
        "siglip_loss": 2,  # both towers', made in the forward
        "info_nce": 2,
        "nt_xent": 2,  # not a gradient but as large: the two views in one tensor
    }[name]
    accumulators = 2 if name == "nt_xent" else 1  # one tower's, and both views are its one tower
    accumulator = accumulators * n * D * 4 if dtype == "bfloat16" else 0
    return WORKSPACE + held * one + accumulator + VECTORS * 8 * n + FIXED


LOSSES = ("clip_loss", "siglip_loss", "info_nce", "nt_xent")


def check(loss: str, sizes: list[int]) -> None:
    for dtype, found in peaks(loss, ["float32", "bfloat16"], sizes).items():
        for n, extra in zip(sizes, found, strict=True):
            allowed = contract(loss, dtype, n)
            assert allowed < 4 * n * n, "the bound would let a whole matrix pass"
            assert extra <= allowed, f"N={n}: {extra / MIB:.2f} MiB, allowed {allowed / MIB:.2f}"
        # A MiB more for what comes in pages. A stored matrix would make four of one.
        small, large = found
        assert large <= 2 * small + MIB, f"{small / MIB:.2f} -> {large / MIB:.2f} MiB"


@pytest.mark.parametrize("loss", LOSSES)
def test_extra_memory_is_workspace_vectors_and_held_gradients(loss: str) -> None:
    check(loss, [1536, 3072])


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_at_8192_and_16384(loss: str) -> None:
    check(loss, [8192, 16384])


def test_the_workspace_given_is_the_workspace_taken() -> None:
    """At the default budget tiles of this matrix take 8 MiB, which would break this bound."""
    n, workspace = 2048, 1 * MIB
    ((extra,),) = peaks("clip_loss", ["float32"], [n], workspace=workspace).values()
    allowed = contract("clip_loss", "float32", n) - WORKSPACE + workspace
    assert extra <= allowed < 8 * MIB, f"{extra / MIB:.2f} MiB, allowed {allowed / MIB:.2f}"


@pytest.mark.slow
def test_symmetric_infonce_takes_a_twentieth_of_eager() -> None:
    """The bar of the project: float32, 8192 x 8192, D = 512, default workspace."""
    case = "clip_loss", ["float32"], [8192]
    at = {"d": 512, "workspace": None, "threads": torch.get_num_threads()}
    ((ours,),) = peaks(*case, **at).values()
    ((theirs,),) = peaks(*case, eagerly=True, **at).values()
    print(f"ours {ours / MIB:.1f} MiB, eager {theirs / MIB:.1f} MiB: {ours / theirs:.2%}")
    assert theirs > 4 * 8192**2, "eager did not even store its matrix: the measurement is broken"
    assert ours <= 0.05 * theirs


if __name__ == "__main__":
    main()
