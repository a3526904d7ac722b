"""Whether Triton is there, and whether it interprets."""

from __future__ import annotations

import functools
import importlib.util
import os


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, one program after another."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
