"""Gradients against finite differences in float64; second derivatives, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import ALL, Case


def _as_function(case: Case, function: Callable[..., Any], n: int, d: int, **how: Any) -> Any:
    """The case as a function of its floating tensors alone, and those tensors."""
    tensors = case.tensors(n=n, d=d, scale=3.0)
    leaves = {k: x.requires_grad_() for k, x in tensors.items() if x.is_floating_point()}

    def call(*values: Tensor) -> Any:
        given = tensors | dict(zip(leaves, values, strict=True))
        return function(**given, **case.options, **how)

    return call, tuple(leaves.values())


@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradcheck(case: Case, backend: str) -> None:
    function, leaves = _as_function(case, case.ours, 5, 3, backend=backend)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradcheck_over_many_tiles(case: Case, backend: str) -> None:
    """Fast mode: random projections, of tiles that a small workspace makes many."""
    function, leaves = _as_function(case, case.ours, 150, 2, backend=backend, workspace=1 << 16)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_reference_can_be_differentiated_twice(case: Case) -> None:
    function, leaves = _as_function(case, case.ours, 3, 2, backend="reference")
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def _inputs(case: Case) -> list[str]:
    return [name for name, x in case.tensors().items() if x.is_floating_point()]


def _second_derivatives(case: Case, name: str, backend: str) -> list[Tensor | None]:
    """Of the sum of one input's gradient, by all inputs."""
    function, leaves = _as_function(case, case.ours, 4, 3, backend=backend)
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(x.exp().sum() for x in outputs)
    leaf = leaves[_inputs(case).index(name)]
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    return list(torch.autograd.grad(gradient.sum(), leaves, allow_unused=True))


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in ALL for name in _inputs(case)], ids=str
)
def test_second_derivatives_are_right_or_refused(case: Case, name: str, backend: str) -> None:
    """What takes an operator's gradient twice is refused; plain vector terms around it are right.

    `sum(exp(.))` makes the incoming gradient depend on the inputs, so that a term which is silently
    missing shows.
    """
    try:
        given = _second_derivatives(case, name, backend)
    except RuntimeError as error:
        assert 'use backend="reference"' in str(error)  # noqa: PT017
        return
    assert name in ("temperature", "diag_bias"), "only vector terms need no second derivative"
    for ours, right in zip(given, _second_derivatives(case, name, "reference"), strict=True):
        torch.testing.assert_close(ours, right)
