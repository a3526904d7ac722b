"""The library's side: each case's loss through fastcl, and its float64 truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastcl
from benchmarks.eager import LossFunction
from benchmarks.inputs import TEMPERATURE
from fastcl.kernels import dispatch


def fastcl_loss(loss: str, backend: str = "auto") -> LossFunction:
    """fastcl's function of a case's tensors."""
    return _bound(fastcl, loss, backend=backend)


def truth(loss: str) -> LossFunction:
    """The specification; pass float64 tensors."""
    return _bound(fastcl.reference, loss)


def _bound(module: Any, loss: str, **how: Any) -> LossFunction:
    name = {"clip": "clip_loss", "siglip": "siglip_loss", "moco": "info_nce"}.get(loss, loss)
    function = getattr(module, name)
    if loss in TEMPERATURE:
        how["temperature"] = TEMPERATURE[loss]

    def call(*tensors: Tensor) -> Tensor:
        value: Tensor = function(*tensors, **how)
        return value

    return call


def backend_name(backend: str, device: torch.device) -> str:
    """The backend that will really run."""
    return dispatch.resolve(backend, device)
