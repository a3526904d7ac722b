"""The portable backend: the same walk over tiles, with plain PyTorch on each. Any device."""

from __future__ import annotations

import torch

from fastcl.kernels.streamed import StreamedPrimitives
from fastcl.kernels.tiles import TorchTiles


class TorchBackend(StreamedPrimitives):
    """Streams tiles through PyTorch's own operations; slower than compiled kernels."""

    def __init__(self) -> None:
        super().__init__(TorchTiles())

    def unavailable(self, device: torch.device) -> str | None:
        """Runs everywhere."""
        return None
