"""Whether Triton is there, whether it interprets, and for what it compiles."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, one program after another."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the tensors' device, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 where there are no such numbers (ROCm)."""
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch is set."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors (compute units) there are; a few in the interpreter."""
    if interpreted():
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
