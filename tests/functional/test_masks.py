"""Pairs that are left out, and lines of which everything is left out."""

from __future__ import annotations

import pytest
import torch

import fastcl
from tests.cases import LOSSES, Case
from tests.rule import evaluate

IN_BATCH = [case for case in LOSSES if str(case) in ("clip", "siglip", "info_nce", "nt_xent")]


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
@pytest.mark.parametrize("case", IN_BATCH, ids=str)
def test_ids_of_any_integer_type(case: Case, ids_dtype: torch.dtype, backend: str) -> None:
    tensors = case.tensors(n=9) | {"ids": torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5]).to(ids_dtype)}
    right = evaluate(case.truth, tensors, case.options)
    for name, x in evaluate(case.ours, tensors, case.options | {"backend": backend}).items():
        torch.testing.assert_close(x, right[name])


@pytest.mark.parametrize("case", IN_BATCH, ids=str)
def test_ids_far_apart_are_not_confused(case: Case, backend: str) -> None:
    """Equal in their low 32 bits, or as float32, and yet different."""
    ids = torch.tensor([1, 1 + (1 << 32), 1 + (1 << 40), -1, (1 << 62) + 1, 1 << 62])
    tensors = case.tensors(n=6)
    without = evaluate(case.ours, tensors, case.options | {"backend": backend})
    given = tensors | {"ids": ids}
    for name, x in evaluate(case.ours, given, case.options | {"backend": backend}).items():
        torch.testing.assert_close(x, without[name])


@pytest.mark.parametrize("case", IN_BATCH, ids=str)
def test_all_ids_equal_leaves_only_positives(case: Case, backend: str) -> None:
    tensors = case.tensors(n=7) | {"ids": torch.full((7,), 3)}
    result = evaluate(case.ours, tensors, case.options | {"backend": backend})
    right = evaluate(case.truth, tensors, case.options)
    for name, x in result.items():
        assert x.isfinite().all(), name
        torch.testing.assert_close(x, right[name])
    if case.function != "siglip_loss":
        assert result["output 0"] == 0


def _masked(dim: str, backend: str, **more: object) -> dict[str, torch.Tensor]:
    """Row 2 and column 3 are dropped altogether."""
    row_ids, col_ids = torch.arange(5), torch.arange(10, 16)
    u, v = torch.randn(5, 3), torch.randn(6, 3)
    row_bias, col_bias = torch.zeros(5), torch.zeros(6)
    row_bias[2], col_bias[3] = -torch.inf, -torch.inf
    tensors = {"u": u, "v": v, "row_ids": row_ids, "col_ids": col_ids, "col_bias": col_bias}
    tensors |= {"row_bias": row_bias, "scale": torch.tensor(3.0)}
    return evaluate(fastcl.similarity_logsumexp, tensors, {"dim": dim, "backend": backend})


@pytest.mark.parametrize("dim", ["rows", "cols", "both"])
def test_fully_masked_lines_are_minus_infinity_without_gradient(dim: str, backend: str) -> None:
    result = _masked(dim, backend)
    outputs = [x for name, x in result.items() if name.startswith("output")]
    dropped = {"rows": [2], "cols": [3], "both": [2, 3]}[dim]
    for values, index in zip(outputs, dropped, strict=True):
        assert values[index] == -torch.inf
        assert values.isfinite().sum() == len(values) - 1
    for name, x in result.items():
        if name.startswith("gradient"):
            assert x.isfinite().all(), name
    assert not result["gradient of u"][2].any()
    assert not result["gradient of v"][3].any()


@pytest.mark.parametrize("add_zero", [False, True])
@pytest.mark.parametrize("n", [4, 300])
def test_row_masked_by_ids(n: int, add_zero: bool, backend: str) -> None:
    """The weighted sum: -inf for such a row, or exactly 0 with an added zero."""
    row_ids, col_ids = torch.arange(n), torch.full((n + 1,), n - 2)
    u, v = torch.randn(n, 3, requires_grad=True), torch.randn(n + 1, 3, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    weights = torch.zeros(n)
    weights[n - 2] = 1.0
    total = fastcl.similarity_weighted_logsumexp(
        u,
        v,
        weights,
        scale=scale,
        row_ids=row_ids,
        col_ids=col_ids,
        add_zero=add_zero,
        backend=backend,
        workspace=1 << 16,
    )
    assert total == (0.0 if add_zero else -torch.inf)
    total.backward()
    for leaf in (u, v, scale):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("frozen", [False, True], ids=["both-towers", "query-only"])
def test_masked_rows_beside_others(frozen: bool, backend: str) -> None:
    row_ids = torch.tensor([7, 1, 2, 3])
    tensors = {"u": torch.randn(4, 3), "v": torch.randn(5, 3), "scale": torch.tensor(2.0)}
    tensors |= {"row_ids": row_ids, "col_ids": torch.full((5,), 7), "weights": torch.ones(4)}
    freeze = ("v",) if frozen else ()
    ours = evaluate(
        fastcl.similarity_weighted_logsumexp,
        tensors,
        {"add_zero": True, "backend": backend},
        frozen=freeze,
    )
    reference = fastcl.reference.similarity_weighted_logsumexp
    right = evaluate(reference, tensors, {"add_zero": True}, frozen=freeze)
    for name, x in ours.items():
        assert x.isfinite().all(), name
        torch.testing.assert_close(x, right[name])
