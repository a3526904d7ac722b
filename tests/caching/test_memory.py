"""Peak memory of a process, as the kernel counts it: that of a chunk, whatever the batch."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcl

ROOT = Path(__file__).resolve().parents[2]
CHUNK, TIMES = 8, 64
# What is freed goes back at once: the peak is of what is in use, not of what glibc holds back.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs here"
)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _peak(n: int, cached: bool) -> int:
    """Of a step over n samples, above what is there before: inputs, weights and gradients."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x = torch.randn(n, 64, 128)

    def encode(rows: torch.Tensor) -> torch.Tensor:
        return encoder(rows).mean(dim=1)

    def step(x: torch.Tensor) -> None:
        if cached:
            with fastcl.grad_cache(chunk_size=CHUNK) as cache:
                z = cache(encode, x)
                fastcl.info_nce(z, z.flip(1), normalize=True).backward()
        else:
            z = encode(x)
            fastcl.info_nce(z, z.flip(1), normalize=True).backward()

    step(x[:2])  # weights' gradients, and what is made once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(x)
    return _status("VmHWM") - before


def _measured(n: int, cached: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.caching.test_memory", str(n), str(int(cached))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **ALLOCATOR},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return int(done.stdout)


def test_a_batch_64_times_as_large() -> None:
    """Takes at most 1.2 times the memory of a step over one chunk without a cache."""
    small, large = _measured(CHUNK, False), _measured(CHUNK * TIMES, True)
    assert small > 20 << 20
    assert large <= 1.2 * small


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_peak(int(sys.argv[1]), bool(int(sys.argv[2]))))
