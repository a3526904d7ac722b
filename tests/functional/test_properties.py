"""Losses of random shapes, modes and ids: the reference's and every backend's, against the truth."""

from __future__ import annotations

from hypothesis import given

from tests.cases import streamed_backends
from tests.rule import check_logic
from tests.strategies import Call, loss_calls

WAYS = [
    {"backend": backend, "workspace": workspace}
    for backend in streamed_backends()
    for workspace in (None, 1 << 16)
]


@given(call=loss_calls())
def test_any_loss(call: Call) -> None:
    case, tensors = call
    check_logic(case, tensors, *WAYS)
