"""NaN and infinity in any input reach the output: never a wrong finite number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from tests.cases import ALL, DTYPES, Case, Tensors
from tests.rule import cast

VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
# n and the lengths made from it end inside a vector, whatever its width.
N, D = 19, 5


def _spoiled(tensors: Tensors, name: str, position: int, value: float) -> Tensors:
    x = tensors[name].clone()
    x.view(-1)[position] = value
    return tensors | {name: x}


def _outputs(
    case: Case, function: Callable[..., Any], tensors: Tensors, **options: Any
) -> list[Tensor]:
    outputs = function(**tensors, **case.options, **options)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _check(case: Case, spoiled: Tensors, where: str, **how: Any) -> bool:
    """We are NaN where the truth is and not finite where it is not; says whether that is anywhere.

    The other way round only without infinities: of what an infinity makes -inf, so that the truth
    drops it, eager PyTorch often makes NaN too.
    """
    exact = {k: x.double() if x.is_floating_point() else x for k, x in spoiled.items()}
    reached = False
    results = _outputs(case, case.ours, spoiled, **how), _outputs(case, case.truth, exact)
    for ours, right in zip(*results, strict=True):
        assert not ours[~right.isfinite()].isfinite().any(), where
        if "inf" not in where:
            assert torch.equal(ours.isnan(), right.isnan()), where
        reached = reached or not right.isfinite().all()
    return reached


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_spoiled_input(case: Case, dtype: torch.dtype, value: str, backend: str) -> None:
    """First, middle and last element of every input, of any of which a vector may hold the tail."""
    tensors = cast(case.tensors(n=N, d=D), dtype)
    for name, x in tensors.items():
        if not x.is_floating_point():
            continue
        places = sorted({0, x.numel() // 2, x.numel() - 1})
        reached = [
            _check(
                case,
                _spoiled(tensors, name, place, VALUES[value]),
                f"{value} in {name}[{place}]",
                backend=backend,
            )
            for place in places
        ]
        dropped = value == "-inf" or name in ("temperature", "negative_keys", "diag_bias")
        assert any(reached) or dropped, f"{value} in {name} should have reached the truth"


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_spoiled_last_tile(case: Case, dtype: torch.dtype, value: str, backend: str) -> None:
    """The last element of the last of many tiles."""
    tensors = cast(case.tensors(n=150, d=3), dtype)
    how = {"backend": backend, "workspace": 1 << 16}
    for name, x in tensors.items():
        if x.dim() > 1:
            spoiled = _spoiled(tensors, name, x.numel() - 1, VALUES[value])
            _check(case, spoiled, f"{value} in {name}[-1]", **how)


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


@pytest.mark.parametrize("bias", [-torch.inf, torch.inf])
def test_a_zero_beside_an_infinite_row(bias: float, backend: str) -> None:
    """An empty row of log(1 + sum) is worth 0; an infinite one makes the sum infinite."""
    u, v = torch.randn(5, 4), torch.randn(7, 4)
    row_bias = torch.tensor([0.0, bias, 1.0, 0.0, 0.0])
    how = {"row_bias": row_bias, "add_zero": True}
    found = fastcl.similarity_weighted_logsumexp(u, v, backend=backend, **how)
    right = fastcl.similarity_weighted_logsumexp(u, v, backend="reference", **how)
    torch.testing.assert_close(found, right)
