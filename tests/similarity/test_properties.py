"""Primitives of random shapes and options: the reference and every backend, against the truth."""

from __future__ import annotations

from hypothesis import given

from tests.cases import streamed_backends
from tests.rule import check_logic
from tests.strategies import Call, logsumexp_calls, sigmoid_calls, weighted_calls

WAYS = [
    {"backend": backend, "workspace": workspace}
    for backend in streamed_backends()
    for workspace in (None, 1 << 16)
]


@given(call=logsumexp_calls())
def test_any_logsumexp(call: Call) -> None:
    case, tensors = call
    check_logic(case, tensors, *WAYS)


@given(call=weighted_calls())
def test_any_weighted_logsumexp(call: Call) -> None:
    case, tensors = call
    check_logic(case, tensors, *WAYS)


@given(call=sigmoid_calls())
def test_any_sigmoid(call: Call) -> None:
    case, tensors = call
    check_logic(case, tensors, *WAYS)
