"""Running a part of a computation again exactly: random numbers and autocast as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Surroundings:
    """The generators' states on the CPU and some devices, and what autocast does there."""

    python: Any
    numpy: Any
    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    autocast: tuple[tuple[str, dict[str, Any]], ...]

    @staticmethod
    def now(devices: set[torch.device], before: Surroundings | None = None) -> Surroundings:
        """Of this moment; what is still as it was `before` is shared with that."""
        others = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
        states = tuple((d, _module(d).get_rng_state(d)) for d in others)
        kinds = sorted({"cpu", *(d.type for d in others)})
        autocast = tuple((kind, _autocast(kind)) for kind in kinds)
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        if before is not None and python == before.python:  # 25 KB of Python's integers
            python = before.python
        return Surroundings(python, numpy, torch.get_rng_state(), states, autocast)

    def restore(self) -> None:
        """Sets the generators back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            _module(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """In there all is as it was."""
        self.restore()
        with contextlib.ExitStack() as stack:
            for kind, how in self.autocast:
                stack.enter_context(torch.autocast(kind, **how))
            yield


@contextlib.contextmanager
def without_autocast(devices: set[torch.device]) -> Iterator[None]:
    """A backward computes in the dtypes of its forward, whatever is around it."""
    with contextlib.ExitStack() as stack:
        for kind in sorted({"cpu", *(d.type for d in devices if d.type != "meta")}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _autocast(kind: str) -> dict[str, Any]:
    return {
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
