"""The float64 rule: errors are measured against eager PyTorch's. The only source of tolerances.

**The error norm** is the largest absolute error of a tensor (a loss, or the gradient of one input)
over all its elements, and over all draws of a case. Absolute, not relative: gradients have elements
near 0 by cancellation, which no computation in finite precision gets right relatively, and an
optimiser adds them to numbers of the size of the largest. Over several draws, because on a single
one a scalar's error, ours or eager's, can be 0 by luck; the worst of some draws is a property of
the code. Draws whose magnitudes differ by orders are taken `apart`: each draw's error in ulps of
its own largest element, so that one draw does not stand for all.

**The bound**: for 16-bit inputs, eager's error on the same draws; for float32 and float64, twice
eager's plus 4 ulp, an ulp being that of the returned dtype at the largest magnitude of the true
tensor. Where eager is NaN or infinite, anything finite. In 16 bits, half an ulp and 4 ulp of
float32 are always allowed: it is what rounding a float32 result to the returned dtype costs, and
where eager has less it is because that dtype happens to hold the true number (powers of two), or
because the tensor is float32 for us and 16 bits for eager.

**The truth** is `tests.exact` on the inputs as they were rounded: the reference's formulas in more
than float64, without which float64 itself could not be measured. tests/test_exact.py compares
the two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import exact
from tests.cases import Case

Tensors = Mapping[str, Tensor]
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def cast(tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in `dtype`; single numbers in float32 beside 16-bit embeddings.

    That is mixed precision as it is used: parameters such as a scale stay in float32.
    """
    number = torch.float32 if dtype in SIXTEEN_BIT else dtype
    return {
        name: t.to(number if t.dim() == 0 else dtype) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def cotangent(output: Tensor) -> Tensor:
    """What a loss is multiplied with: 1/2, and for vectors weights exact in every dtype."""
    return torch.from_numpy(exact.cotangent(tuple(output.shape)).astype(np.float64)).to(output)


def _factor(tensors: Tensors) -> float:
    """A further factor of it in 16 bits: no power of 2, so that a gradient rounded twice shows."""
    return 0.75 if any(x.dtype in SIXTEEN_BIT for x in tensors.values()) else 1.0


def evaluate(
    function: Callable[..., Any],
    tensors: Tensors,
    options: Mapping[str, Any],
    frozen: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Loss (or statistics) and the gradient of every floating tensor that is not `frozen`."""
    leaves = {
        name: t.detach().requires_grad_(name not in frozen) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [_factor(tensors) * cotangent(x) for x in outputs])
    result = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    for name, leaf in leaves.items():
        if leaf.is_floating_point() and leaf.requires_grad:
            assert leaf.grad is not None, f"{name} has no gradient"
            assert leaf.grad.shape == leaf.shape
            assert leaf.grad.dtype == leaf.dtype
            result[f"gradient of {name}"] = leaf.grad
    return result


def truth(case: Case, tensors: Tensors) -> dict[str, np.ndarray]:
    """What is right for these inputs, to more digits than their dtype has."""
    arrays = {
        name: x.double().numpy().astype(np.longdouble) if x.is_floating_point() else x.numpy()
        for name, x in tensors.items()
    }
    with np.errstate(over="ignore", under="ignore"):
        outputs, gradients = getattr(exact, case.function)(**arrays, **case.options)
    named = {f"output {i}": x for i, x in enumerate(outputs)}
    factor = np.longdouble(_factor(tensors))
    return named | {f"gradient of {name}": factor * g for name, g in gradients.items()}


@dataclass
class Error:
    """One tensor's largest error and largest true magnitude, in each of the draws of a case."""

    errors: list[float] = field(default_factory=list)
    magnitudes: list[float] = field(default_factory=list)
    dtype: torch.dtype = torch.float64

    def add(self, value: Tensor, right: np.ndarray) -> None:
        """Takes one more draw in; a NaN, or an infinity where the truth fits the dtype, stays."""
        given = value.double().numpy().astype(np.longdouble)
        fits = torch.as_tensor(np.asarray(right, np.float64)).to(value.dtype).isfinite().numpy()
        right = np.where(fits, right, np.copysign(np.inf, right))
        with np.errstate(invalid="ignore"):
            error = np.where(given == right, 0, abs(given - right))
        self.errors.append(float(error.max()))
        self.magnitudes.append(float(abs(right[np.isfinite(right)]).max(initial=0)))
        self.dtype = value.dtype

    @property
    def largest_error(self) -> float:
        """Over all draws; NaN where one is."""
        return float(np.max(self.errors))

    @property
    def ulp(self) -> float:
        """The spacing of the returned dtype's numbers at the largest true magnitude."""
        return _ulp(max(self.magnitudes), self.dtype)

    def apart(self) -> Error:
        """The same with every draw's error in ulps of its own."""
        ulps = [_ulp(magnitude, self.dtype) for magnitude in self.magnitudes]
        errors = [error / ulp for error, ulp in zip(self.errors, ulps, strict=True)]
        return Error(errors, [1.0 / torch.finfo(self.dtype).eps], self.dtype)


def _ulp(magnitude: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(magnitude, info.tiny)))
    return 2.0**exponent * info.eps


def measure(
    function: Callable[..., Any],
    case: Case,
    draws: Sequence[Tensors],
    truths: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, Error]:
    """Errors of a function over some draws."""
    errors: dict[str, Error] = {}
    for tensors, right in zip(draws, truths, strict=True):
        for name, value in evaluate(function, tensors, case.options).items():
            errors.setdefault(name, Error()).add(value, right[name])
    return errors


def violations(
    ours: dict[str, Error], eager: dict[str, Error], dtype: torch.dtype, *, apart: bool = False
) -> dict[str, str]:
    """The tensors that break the rule, each with the numbers."""
    found = {}
    for name, error in ours.items():
        theirs = eager[name]
        if apart:
            # In ulps of the draws as ours returns them: eager's tensor may be 16 bits, ours not.
            theirs = replace(theirs, dtype=error.dtype).apart()
            error = error.apart()
        allowed = theirs.largest_error
        if not math.isfinite(allowed):
            allowed = torch.finfo(torch.float64).max  # eager fails: anything finite is better
        if dtype in SIXTEEN_BIT:
            of_float32 = torch.finfo(torch.float32).eps / torch.finfo(error.dtype).eps
            allowed = max(allowed, (0.5 + 4 * of_float32) * error.ulp)
        else:
            allowed = 2 * allowed + 4 * error.ulp
        if not error.largest_error <= allowed:
            found[name] = (
                f"error {error.largest_error:.3g} > {allowed:.3g} (eager's "
                f"{theirs.largest_error:.3g}, ulp {error.ulp:.3g})"
            )
    return found


def check_rule(
    case: Case,
    dtype: torch.dtype,
    draws: Sequence[Tensors],
    *ways: Mapping[str, Any],
    apart: bool = False,
) -> None:
    """Asserts the rule for each of some ways: options that eager does not have (a backend)."""
    if dtype == torch.float64 and not exact.AVAILABLE:
        pytest.skip("numpy's longdouble is no wider than float64 here: nothing to measure it by")
    draws = [cast(tensors, dtype) for tensors in draws]
    truths = [truth(case, tensors) for tensors in draws]
    theirs = measure(case.eager, case, draws, truths)
    broken = {}
    for way in ways:
        mine = measure(functools.partial(case.ours, **way), case, draws, truths)
        found = violations(mine, theirs, dtype, apart=apart)
        if found:
            broken[str(way)] = found
    assert not broken, f"the float64 rule is broken: {broken}"
