"""NaN and infinity in any input reach the output: never a wrong finite number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import ALL, DTYPES, Case, Tensors
from tests.rule import cast

VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
# n and the lengths made from it end inside a vector, whatever its width.
N, D = 19, 5


def _spoiled(tensors: Tensors, name: str, position: int, value: float) -> Tensors:
    x = tensors[name].clone()
    x.view(-1)[position] = value
    return tensors | {name: x}


def _places(tensors: Tensors) -> list[tuple[str, int]]:
    """First, middle and last element of every floating input."""
    return [
        (name, position)
        for name, x in tensors.items()
        if x.is_floating_point()
        for position in sorted({0, x.numel() // 2, x.numel() - 1})
    ]


def _outputs(
    case: Case, function: Callable[..., Any], tensors: Tensors, **options: Any
) -> list[Tensor]:
    outputs = function(**tensors, **case.options, **options)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_spoiled_input(case: Case, dtype: torch.dtype, value: str, backend: str) -> None:
    """Where the reference in float64 is NaN or infinite, so are we; NaN for NaN."""
    tensors = cast(case.tensors(n=N, d=D), dtype)
    for name, position in _places(tensors):
        spoiled = _spoiled(tensors, name, position, VALUES[value])
        exact = {k: x.double() if x.is_floating_point() else x for k, x in spoiled.items()}
        for ours, right in zip(
            _outputs(case, case.ours, spoiled, backend=backend),
            _outputs(case, case.truth, exact),
            strict=True,
        ):
            where = f"{value} in {name}[{position}]"
            assert torch.equal(ours.isfinite(), right.isfinite()), where
            if value == "nan":
                assert torch.equal(ours.isnan(), right.isnan()), where
                assert right.isnan().any(), f"{where} should have reached the truth"


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_spoiled_last_tile(case: Case, dtype: torch.dtype, value: str, backend: str) -> None:
    """The last element of the last of many tiles."""
    tensors = cast(case.tensors(n=150, d=3), dtype)
    for name, x in tensors.items():
        if x.dim() < 2:
            continue
        spoiled = _spoiled(tensors, name, x.numel() - 1, VALUES[value])
        outputs = _outputs(case, case.ours, spoiled, backend=backend, workspace=1 << 16)
        assert not all(out.isfinite().all() for out in outputs), f"{value} in {name}[-1]"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_nan_with_gradients_made_in_the_forward(case: Case, backend: str) -> None:
    tensors = case.tensors(n=N, d=D)
    name = next(iter(tensors))
    leaves = {
        k: x.requires_grad_() if x.is_floating_point() else x
        for k, x in _spoiled(tensors, name, N * D - 1, torch.nan).items()
    }
    outputs = _outputs(case, case.ours, leaves, backend=backend)
    assert any(x.isnan().any() for x in outputs)
    sum(x.nan_to_num(0.0).sum() + x[x.isnan()].sum() for x in outputs).backward()
    assert leaves[name].grad.isnan().any()
