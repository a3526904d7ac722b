"""Losses of random shapes, options and ids against the reference, in float64.

The rule has its own tests; these look for wrong logic, so the bound is far above rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import fastcl
from tests.cases import LOSSES, PRIMITIVES, Case
from tests.rule import evaluate

sizes = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 65, 130]) | st.integers(1, 600)
keys = st.none() | st.integers(1, 1300)  # beyond the 1024 columns of the largest CPU tiles' blocks
dims = st.sampled_from([1, 3, 16, 31])
scales = st.sampled_from([0.5, 10.0, 100.0])


@given(
    case=st.sampled_from([*LOSSES, *PRIMITIVES]),
    n=sizes,
    keys=keys,
    d=dims,
    scale=scales,
    seed=st.integers(0, 1 << 16),
    small=st.booleans(),
    backend=st.sampled_from(["cpu", "torch"]),
)
def test_random_cases_equal_the_reference(
    case: Case, n: int, keys: int | None, d: int, scale: float, seed: int, small: bool, backend: str
) -> None:
    if backend not in fastcl.available_backends("cpu"):
        backend = "torch"
    first = case.options.get("positives", case.options.get("mask_diagonal"))
    if keys is not None and first is not None:
        keys += n + first  # every row has a partner
    tensors = case.tensors(seed=seed, n=n, d=d, scale=scale, keys=keys)
    how: dict[str, Any] = {"backend": backend, "workspace": 1 << 16 if small else None}
    ours = evaluate(case.ours, tensors, {**case.options, **how})
    truth = evaluate(case.truth, tensors, case.options)
    for name, right in truth.items():
        bound = 1e-9 * max(1.0, scale)
        torch.testing.assert_close(ours[name], right, rtol=1e-9, atol=bound, msg=name)
