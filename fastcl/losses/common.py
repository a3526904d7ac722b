"""What the modules share: options that are checked when they are made, and a temperature."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastcl.distributed.ranks import Mode, check_options
from fastcl.distributed.team import Group
from fastcl.functional.common import REDUCTIONS, Reduction
from fastcl.kernels.dispatch import check_name
from fastcl.similarity.inputs import check_choice, check_workspace, python_number


def check_flag(name: str, value: bool) -> None:
    """True or False, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


_L = TypeVar("_L", bound="Loss")


class Loss(nn.Module):
    """The options that every loss has; `forward` passes them on as ``**self.options``."""

    defaults: ClassVar[dict[str, Any]] = {
        "reduction": "mean",
        "normalize": False,
        "group": None,
        "mode": "auto",
        "reduce_dtype": None,
        "backend": "auto",
        "workspace": None,
    }

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        normalize: bool = False,
        group: Group | None = None,
        mode: Mode = "auto",
        reduce_dtype: torch.dtype | None = None,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_flag("normalize", normalize)
        check_options(mode, reduce_dtype)
        check_name(backend)
        self.workspace = None if workspace is None else check_workspace(workspace, default=0)
        self.reduction = reduction
        self.normalize = normalize
        self.group = group
        self.mode = mode
        self.reduce_dtype = reduce_dtype
        self.backend = backend

    def __deepcopy__(self: _L, memo: dict[int, Any]) -> _L:
        """A copy (of a model for its moving average, say) talks to the same group."""
        memo[id(self.group)] = self.group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled."""
        if self.group is not None:
            raise TypeError(
                f"{type(self).__name__} has a group, and a process group cannot be pickled: save "
                "its state_dict(), or set its group to None first"
            )
        return self.__dict__

    @property
    def options(self) -> dict[str, Any]:
        """The options by the names that the function has for them."""
        return {name: getattr(self, name) for name in self.defaults}

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        changed = {k: v for k, v in self.options.items() if v != self.defaults[k]}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


class TemperatureLoss(Loss):
    """A loss with a temperature of its own, fixed or learned.

    A learned temperature is a parameter ``log_temperature``, so that it stays positive.
    """

    def __init__(self, temperature: float, learn_temperature: bool, **options: Any) -> None:
        super().__init__(**options)
        check_flag("learn_temperature", learn_temperature)
        temperature = python_number(temperature)
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(
                f"temperature must be a number, not {type(temperature).__name__}; "
                "learn_temperature=True makes it a parameter"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature is {temperature}; expected a positive number such as 0.07"
            )
        self._temperature = float(temperature)
        self.log_temperature: nn.Parameter | None = None
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(self._temperature).log())

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or a 0-dim tensor with a gradient where it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def extra_repr(self) -> str:
        """The temperature it started from, and the options."""
        learned = "learn_temperature=True" if self.log_temperature is not None else ""
        shown = (f"temperature={self._temperature}", learned, super().extra_repr())
        return ", ".join(filter(None, shown))
