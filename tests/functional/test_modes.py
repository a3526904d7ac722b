"""PyTorch's modes: no_grad, inference_mode, autocast, retained graphs, accumulated gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.similarity.statistics import pair_statistics
from tests.cases import ALL, Case
from tests.rule import cast, check_rule, cotangent, evaluate


def _call(case: Case, tensors: dict[str, Tensor], **how: Any) -> tuple[Tensor, ...]:
    outputs = case.ours(**tensors, **case.options, **how)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_without_gradients(case: Case, mode: Any, backend: str) -> None:
    tensors = cast(case.tensors(), torch.float32)
    leaves = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in tensors.items()}
    with_graph = _call(case, leaves, backend=backend)
    with mode():
        for x, expected in zip(_call(case, leaves, backend=backend), with_graph, strict=True):
            assert not x.requires_grad
            assert torch.equal(x, expected.detach())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_nothing_unwritten_is_read(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = cast(case.tensors(n=130, d=7), dtype)
    for workspace in (None, 1 << 16):
        options = case.options | {"backend": backend, "workspace": workspace}
        for name, x in evaluate(case.ours, tensors, options).items():
            assert x.isfinite().all(), (name, workspace)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kept", ["both", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_positives_alone(dtype: torch.dtype, kept: str, backend: str) -> None:
    """No product is made for them, and what was never added to is zero."""
    u = torch.randn(9, 4, dtype=dtype, requires_grad=True)
    v = torch.randn(12, 4, dtype=dtype, requires_grad=True) if kept == "both" else None
    how: dict[str, Any] = {"scale": 2.0, "positives": 2, "backend": backend}
    positives = pair_statistics(u, v, **how, mirrored=v is None).positives
    positives.sum().backward()
    keys = u if v is None else v
    expected = torch.zeros(len(u), 4, dtype=dtype)
    expected[: len(positives)] += 2 * keys.detach()[2 : 2 + len(positives)]
    if v is None:
        expected[2:] += 2 * u.detach()[:7]
    else:
        assert v.grad is not None
        assert torch.equal(v.grad[:2], torch.zeros(2, 4, dtype=dtype))
    torch.testing.assert_close(u.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positives", [0, 49])
def test_more_rows_than_partners(positives: int, dtype: torch.dtype, backend: str) -> None:
    """Whole chunks of rows lie past the last one that has a positive."""
    case = Case("", "similarity_sigmoid", dict, {"reduction": "rows", "positives": positives})
    draws = [
        {"u": torch.randn(300, 8), "v": torch.randn(50, 8), "scale": torch.tensor(0.5)}
        | {"bias": torch.tensor(-1.0)}
        for _ in range(4)
    ]
    check_rule(case, dtype, draws, {"backend": backend, "workspace": 1 << 16})


@pytest.mark.parametrize("case", ALL, ids=str)
def test_inputs_made_in_inference_mode(case: Case, backend: str) -> None:
    with torch.inference_mode():
        tensors = cast(case.tensors(), torch.float32)
        expected = _call(case, tensors, backend=backend)
    for x, right in zip(_call(case, tensors, backend=backend), expected, strict=True):
        assert torch.equal(x, right)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_autocast_changes_nothing_for_float32(case: Case, backend: str) -> None:
    tensors = cast(case.tensors(), torch.float32)
    options = case.options | {"backend": backend}
    plain = evaluate(case.ours, tensors, options)
    with torch.autocast("cpu", torch.bfloat16):
        forward_and_backward = evaluate(case.ours, tensors, options)
    for name, x in forward_and_backward.items():
        assert x.dtype == plain[name].dtype
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("case", ALL, ids=str)
def test_features_that_autocast_made(case: Case, backend: str) -> None:
    """bfloat16 from an encoder under autocast: the same as bfloat16 without."""
    tensors = cast(case.tensors(), torch.bfloat16)
    options = case.options | {"backend": backend}
    plain = evaluate(case.ours, tensors, options)
    with torch.autocast("cpu", torch.bfloat16):
        for name, x in evaluate(case.ours, tensors, options).items():
            assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("case", ALL, ids=str)
def test_backward_twice_through_a_retained_graph(case: Case, backend: str) -> None:
    """Gradients made in the forward must survive their first use, and be scaled anew."""
    tensors = case.tensors()
    leaves = {k: x.requires_grad_() for k, x in tensors.items() if x.is_floating_point()}
    outputs = _call(case, tensors, backend=backend)
    incoming = [cotangent(x) for x in outputs]
    first = torch.autograd.grad(outputs, leaves.values(), incoming, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves.values(), [2 * x for x in incoming])
    for name, a, b in zip(leaves, first, second, strict=True):
        assert torch.equal(2 * a, b), name


def test_gradients_accumulate(backend: str) -> None:
    u = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(2):
        fastcl.siglip_loss(u, v, 5.0, -5.0, backend=backend).backward()
    accumulated, u.grad = u.grad, None
    fastcl.siglip_loss(u, v, 5.0, -5.0, backend=backend).backward()
    assert torch.equal(accumulated, 2 * u.grad)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_loss_scaler_scales_exactly(case: Case, backend: str) -> None:
    """float16 training multiplies the loss by 2^16: gradients follow, or overflow, exactly."""
    tensors = cast(case.tensors(), torch.float16)
    leaves = {k: x.requires_grad_() for k, x in tensors.items() if x.dim() > 1}
    total = sum(x.sum() for x in _call(case, tensors, backend=backend))
    small = torch.autograd.grad(total, leaves.values(), retain_graph=True)
    large = torch.autograd.grad(total * 2.0**10, leaves.values())
    for name, a, b in zip(leaves, small, large, strict=True):
        normal = (a.abs() > 2 * torch.finfo(torch.float16).tiny) & b.isfinite()
        assert torch.equal(a[normal] * 2.0**10, b[normal]), name


@pytest.mark.parametrize("case", ALL, ids=str)
def test_inputs_are_left_as_they_were(case: Case, backend: str) -> None:
    tensors = cast(case.tensors(), torch.float32)
    before = {k: x.clone() for k, x in tensors.items()}
    evaluate(case.ours, tensors, case.options | {"backend": backend})
    for name, x in tensors.items():
        assert torch.equal(x, before[name]), name
