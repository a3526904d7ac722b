"""Tensors that do not lie in memory as one would like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from tests.cases import ALL, DTYPES, Case, streamed_backends
from tests.rule import cast, check_rule, evaluate


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _strided(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], 3 * x.shape[-1])
    wide[..., 1::3] = x
    return wide[..., 1::3]


def _shifted(x: Tensor) -> Tensor:
    """Starting at an odd address, as a slice of a larger tensor does."""
    flat = torch.cat([x.new_zeros(1), x.flatten()])
    return flat[1:].view(x.shape)


LAYOUTS = {"transposed": _transposed, "strided": _strided, "shifted": _shifted}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_layouts(case: Case, dtype: torch.dtype, layout: str) -> None:
    draws = [cast(case.tensors(seed, n=21, d=7), dtype) for seed in range(6)]
    moved = [{k: LAYOUTS[layout](x) if x.dim() else x for k, x in t.items()} for t in draws]
    check_rule(case, dtype, moved, *({"backend": name} for name in streamed_backends()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_zero_strides(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Expanded rows, biases and ids: one stored number that serves all, and the same bits."""
    tensors = cast(case.tensors(n=21, d=7), dtype)
    expanded = {k: x[:1].expand_as(x) if x.dim() else x for k, x in tensors.items()}
    if "row_ids" in expanded:
        expanded["col_ids"] = expanded["col_ids"] * 0 + expanded["row_ids"][0] + 1
    copied = {k: x.clone(memory_format=torch.contiguous_format) for k, x in expanded.items()}
    options = case.options | {"backend": backend}
    plain = evaluate(case.ours, copied, options)
    for name, x in evaluate(case.ours, expanded, options).items():
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("case", [c for c in ALL if "none" in str(c) or "rows" in str(c)], ids=str)
def test_expanded_incoming_gradient(case: Case, backend: str) -> None:
    """What sum() sends back has stride zero."""

    def summed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **arguments: function(**arguments).sum()

    tensors = case.tensors()
    ours = evaluate(summed(case.ours), tensors, case.options | {"backend": backend})
    right = evaluate(summed(case.truth), tensors, case.options)
    for name, x in ours.items():
        torch.testing.assert_close(x, right[name])


def test_gradients_of_a_slice_reach_the_whole(backend: str) -> None:
    whole = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    fastcl.clip_loss(whole[::2, :3], whole[1::2, 3:], 5.0, backend=backend).backward()
    streamed, whole.grad = whole.grad, None
    fastcl.reference.clip_loss(whole[::2, :3], whole[1::2, 3:], 5.0).backward()
    torch.testing.assert_close(streamed, whole.grad)
