"""normalize=True: rows over their norms, beside what F.normalize does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl.similarity import ops
from tests.cases import NORMALIZED, Case
from tests.functional.test_layouts import LAYOUTS
from tests.rule import cast, evaluate

ROWS = torch.tensor(
    [[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0], [1e-6, -1e-6], [1e15, 1e15], [-2.0, 0.0]]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_gradient_are_those_of_pytorch(dtype: torch.dtype, backend: str) -> None:
    """At zero and below the smallest norm, too: there the norm counts as constant."""
    ours, theirs = (ROWS.to(dtype, copy=True).requires_grad_() for _ in range(2))
    weights = torch.arange(12, dtype=dtype).view(6, 2) - 5
    y, expected = ops.normalize(ours, backend)[0], F.normalize(theirs, dim=1)
    torch.testing.assert_close(y, expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_row(bad: float, backend: str) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    y = ops.normalize(x, backend)[0]
    assert torch.equal(y.isfinite(), F.normalize(x, dim=1).isfinite())


def test_gradcheck(backend: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.normalize(x, backend)[0], x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", NORMALIZED, ids=str)
def test_layouts(case: Case, layout: str, backend: str) -> None:
    tensors = cast(case.tensors(n=21, d=7), torch.float32)
    moved = {k: LAYOUTS[layout](x) if x.dim() else x for k, x in tensors.items()}
    options = case.options | {"backend": backend}
    plain = evaluate(case.ours, tensors, options)
    for name, x in evaluate(case.ours, moved, options).items():
        torch.testing.assert_close(x, plain[name], msg=name)


def test_nothing_wide_is_kept(backend: str) -> None:
    """Beside the input and the result, of 16 bits, only the norms wait for the backward."""
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    pack = lambda t: kept.append(t) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.normalize(x, backend)
    assert sorted(t.numel() for t in kept if t is not x) == [64]


def test_second_derivatives_are_refused(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    loss = fastcl.clip_loss(x, x.flip(0), 2.0, normalize=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_forward_mode_is_refused(backend: str) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="reverse-mode"):
        torch.func.jvp(
            lambda x: fastcl.clip_loss(x, x, 2.0, normalize=True, backend=backend), (x,), (x,)
        )
