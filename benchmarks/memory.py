"""Peak extra memory: a contender alone in a fresh process, above its inputs and its gradients.

On the CPU it is the process's peak resident set: the peak is reset (/proc/self/clear_refs) after
the inputs are there and the libraries are warm, so it includes what no tensor shows, such as the
work buffers of a BLAS. Where there is no such reset, ru_maxrss stands in. On CUDA it is the peak
of the caching allocator.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BOTH, Case
from benchmarks.contenders import COMPILED, loss_function, run_once
from benchmarks.inputs import Inputs, make_inputs

_ROOT = Path(__file__).resolve().parent.parent
_STATUS = Path("/proc/self/status")


class MemoryFailure(Exception):
    """The process that was to be measured did not finish."""


def extra_bytes(
    case: Case, contender: str, backend: str, device: torch.device, threads: int
) -> int:
    """Measures one contender, forward and backward, in a process of its own.

    Raises:
        MemoryFailure: with the last line of what the process said.
    """
    job: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "contender": contender,
        "backend": backend,
    }
    job |= {"device": str(device), "threads": threads}
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(job)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MemoryFailure(lines[-1])
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The measured process."""
    job = json.loads(sys.argv[1])
    case, device = Case(**job["case"]), torch.device(job["device"])
    torch.set_num_threads(job["threads"])
    function = loss_function(job["contender"], case, job["backend"])
    assert function is not None
    inputs = make_inputs(case, 0, device)
    # Code that is compiled for a shape must meet it before; for the others a few rows do, so that
    # no large block that the allocator may keep is there before the measurement.
    warm = inputs if job["contender"] == COMPILED else _few_rows(case, device)
    run_once(function, warm, BOTH)
    warm.clear_gradients()
    before = _reset(device)
    loss = run_once(function, inputs, BOTH)
    peak = _peak(device)
    del loss
    returned = sum(g.numel() * g.element_size() for g in inputs.gradients().values())
    print(json.dumps(max(0, peak - before - returned)))


def _few_rows(case: Case, device: torch.device) -> Inputs:
    rows = min(case.n, 64)
    m = min(case.m, 256) if case.loss == "moco" else rows
    return make_inputs(dataclasses.replace(case, n=rows, m=m), 0, device)


def _reset(device: torch.device) -> int:
    """Memory in use now, from which the peak is counted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return _max_rss()
        return _status("VmRSS")
    return _max_rss()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if sys.platform == "linux" else _max_rss()


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
