"""In which dtypes things are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of tiles, sums, losses, and gradients that wait: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector_dtype(x: Tensor) -> torch.dtype:
    """In what vectors of length N are computed: float64, but for devices that have none."""
    return torch.float32 if x.device.type == "mps" else torch.float64
