"""What the header says of the machine: its kind and abilities, never its name or its paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.schema import Device, Header, Results, without_paths

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_FEATURES = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16"),
    *("asimd", "bf16", "sve", "sve2", "sme"),
)


def describe_device(device: torch.device) -> Device:
    """The device that computes."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return Device(
            kind="cuda",
            name=gpu.name,
            features=[f"sm_{gpu.major}{gpu.minor}"],
            cores=gpu.multi_processor_count,
            memory_gib=round(gpu.total_memory / 2**30, 1),
            driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"(?:flags|Features)\s*: (.*)", text)
    present = set(flags.group(1).split()) if flags else set()
    return Device(
        kind="cpu",
        name=name.group(1) if name else platform.processor() or platform.machine(),
        features=[x for x in _FEATURES if x in present],
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        driver=None,
    )


class OtherLoad:
    """How many cores other processes (and, in a virtual machine, other guests) keep busy."""

    def __init__(self) -> None:
        self._start = self._now()

    def __call__(self) -> float | None:
        """The mean since this object was made."""
        now = self._now()
        if now is None or self._start is None:
            return None
        seconds, busy, own = (end - start for end, start in zip(now, self._start, strict=True))
        return round(max(0.0, busy - own) / seconds, 2) if seconds else None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Wall time, the machine's busy CPU time, and that of this process and its children."""
        if sys.platform != "linux":
            return None
        machine, own = psutil.cpu_times(), os.times()
        busy = machine.user + machine.system + machine.irq + machine.softirq + machine.steal
        return time.perf_counter(), busy + machine.nice, sum(own[:4])


def make_header(device: torch.device) -> Header:
    """The run as it begins; the machine's rates and the load of others come at its end."""
    return Header(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=_command(),
        commit=_output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        dirty=_dirty(),
        device=describe_device(device),
        threads=torch.get_num_threads(),
        versions=_versions(),
        isa={"fastcl": _fastcl_isa(), "torch": torch.backends.cpu.get_cpu_capability()},
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        gemm_tflops={},
        other_load=None,
    )


def available_bytes(device: torch.device) -> int:
    """Memory that is free for a contender."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def default_path(results: Results) -> Path:
    """benchmarks/results/v<schema>-<date>-<device>-<commit>.json"""
    header = results.header
    date = re.sub(r"\W|_", "", header.created.split("+")[0])
    name = re.sub(r"\((R|TM)\)|CPU|@.*", "", header.device.name, flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or header.device.kind
    commit = header.commit + ("-dirty" if header.dirty else "")
    return RESULTS / f"v{results.schema_version}-{date}-{slug}-{commit}.json"


def _command() -> str:
    """How the run was called, without the place where the result goes."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--output":
            next(words, None)
        elif not word.startswith("--output="):
            kept.append(word)
    return without_paths(" ".join(["python -m benchmarks", *kept]))


def _versions() -> dict[str, str | None]:
    import fastcl

    versions: dict[str, str | None] = {
        "fastcl": fastcl.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "os": f"{platform.system()} {platform.machine()}",
    }
    for name in ("triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    mkl = re.search(r"Math Kernel Library Version (\S+)", torch.__config__.show())
    versions["mkl"] = mkl.group(1) if mkl else None
    return versions


def _fastcl_isa() -> str | None:
    try:
        from fastcl import _C as extension  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    return str(extension.isa())


def _dirty() -> bool:
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return changes is None or changes != ""


def _output(*command: str) -> str | None:
    """What a command prints, or None where it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
