"""In which dtypes things are computed, and in which they wait."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of tiles, statistics and losses: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector_dtype(x: Tensor) -> torch.dtype:
    """In what vectors of length N are computed: float64, but for devices that have none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a gradient made in the forward waits: float16 could lose or overflow it."""
    return torch.float32 if dtype == torch.float16 else dtype
