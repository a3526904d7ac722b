"""The error of loss and gradients against float64, on the same rounded inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.eager import LossFunction
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.ours import truth
from benchmarks.schema import Errors

LARGEST = 2048  # pairs: the truth stores the matrix in float64
_SEED = 1_000


class Judge:
    """Knows the truth of a case, cut to :data:`LARGEST` pairs, and judges functions by it."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case.shrunk(LARGEST)
        self.inputs = make_inputs(self.case, _SEED, device)
        exact = self.inputs.to(torch.float64)
        self.loss = _backward(truth(case.loss), exact)
        self.gradients = exact.gradients()

    def errors(self, function: LossFunction) -> Errors:
        """Largest absolute errors, each relative to the largest absolute value of the truth."""
        loss = _backward(function, self.inputs)
        made = self.inputs.gradients()
        return Errors(
            n=self.case.n,
            m=self.case.m,
            loss=_relative(loss, self.loss),
            gradients={name: _relative(made[name], g) for name, g in self.gradients.items()},
        )


def _backward(function: LossFunction, inputs: Inputs) -> Tensor:
    inputs.clear_gradients()
    loss = function(*inputs.arguments())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _relative(value: Tensor, exact: Tensor) -> float | None:
    """None where it is not finite, which JSON cannot say."""
    error = float((value.double() - exact).abs().max() / exact.abs().max())
    return error if math.isfinite(error) else None
