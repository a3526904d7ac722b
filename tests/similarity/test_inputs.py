"""Wrong input is refused at once, with what was given, what is expected and how to mend it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.similarity.statistics import pair_statistics

U, V = torch.randn(4, 3), torch.randn(6, 3)


def lse(**changes: Any) -> Any:
    return fastcl.similarity_logsumexp(**({"u": U, "v": V} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": [[1.0]]}, TypeError, r"u must be a torch.Tensor of shape \[N, D\], not list"),
        ({"u": U[0]}, ValueError, r"u has shape \[3\]; expected \[N, D\]"),
        ({"v": V[None]}, ValueError, r"v has shape \[1, 6, 3\].*flatten the leading"),
        ({"u": U.long()}, TypeError, "u has dtype torch.int64; expected one of float32"),
        ({"u": U.to(torch.complex64)}, TypeError, "u has dtype torch.complex64"),
        ({"u": U[:0]}, ValueError, r"u is empty \(shape \[0, 3\]\).*skip the step"),
        ({"v": V[:, :0]}, ValueError, r"v is empty"),
        ({"v": V[:, :2]}, ValueError, "u has dimension 3 and v has 2"),
        ({"v": V.to("meta")}, ValueError, "u is on cpu and v on meta"),
        ({"scale": "1"}, TypeError, "scale must be a float or a tensor .* not str"),
        ({"scale": True}, TypeError, "scale must be a float .* not bool"),
        ({"scale": np.True_}, TypeError, "scale must be a float .* not bool"),
        ({"scale": np.float32("nan")}, ValueError, "scale is nan; expected a finite number"),
        ({"scale": float("nan")}, ValueError, "scale is nan; expected a finite number"),
        ({"scale": float("inf")}, ValueError, "scale is inf; expected a finite number"),
        ({"scale": torch.ones(2)}, ValueError, r"scale has shape \[2\].*or \[4\] \(one per row\)"),
        ({"scale": torch.tensor(1)}, TypeError, "scale has dtype torch.int64"),
        ({"row_bias": torch.ones(6)}, ValueError, r"row_bias is torch.float32 \[6\].*shape \[4\]"),
        ({"col_bias": torch.ones(6).int()}, ValueError, r"col_bias is torch.int32.*shape \[6\]"),
        ({"col_bias": 1.0}, ValueError, r"col_bias is float; expected .*\[6\]"),
        ({"row_ids": torch.arange(4)}, ValueError, "row_ids is given without col_ids"),
        ({"col_ids": torch.arange(6)}, ValueError, "col_ids is given without row_ids"),
        (
            {"row_ids": torch.arange(4), "col_ids": torch.arange(4)},
            ValueError,
            r"col_ids has shape \[4\]; expected \[6\]",
        ),
        (
            {"row_ids": torch.ones(4), "col_ids": torch.arange(6)},
            TypeError,
            "row_ids has dtype torch.float32; expected integers",
        ),
        (
            {"row_ids": [1, 2, 3, 4], "col_ids": torch.arange(6)},
            TypeError,
            r"row_ids must be an integer tensor of shape \[4\], not list",
        ),
        ({"mask_diagonal": 6}, ValueError, "mask_diagonal is 6; expected 0 to 5"),
        ({"mask_diagonal": -1}, ValueError, "mask_diagonal is -1; expected 0 to 5"),
        ({"mask_diagonal": 0.0}, TypeError, "mask_diagonal must be an int or None, not float"),
        ({"mask_diagonal": True}, TypeError, "mask_diagonal must be an int or None, not bool"),
        ({"mask_diagonal": np.float64(0)}, TypeError, "mask_diagonal must be an int .* not float"),
        ({"mask_diagonal": np.True_}, TypeError, "mask_diagonal must be an int or None, not bool"),
        ({"mask_diagonal": np.int64(6)}, ValueError, "mask_diagonal is 6; expected 0 to 5"),
        ({"dim": "row"}, ValueError, "dim='row' is not known; choose one of rows, cols, both"),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is not known; choose one of auto"),
        ({"workspace": 1.5}, TypeError, "workspace must be a number of bytes .* not float"),
        ({"workspace": 1000}, ValueError, "workspace is 1000 bytes; expected at least 65536"),
        ({"diag_bias": torch.ones(6)}, ValueError, r"diag_bias .*expected .*shape \[4\]"),
        (
            {"diag_bias": torch.ones(4), "mask_diagonal": 0},
            ValueError,
            "diag_bias has no effect with mask_diagonal=0",
        ),
        (
            {"diag_bias": torch.ones(4), "mask_diagonal": 1},
            ValueError,
            "diag_bias and mask_diagonal cannot be given together",
        ),
    ],
)
def test_logsumexp_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    lse()  # what is changed is what is refused
    for backend in ("auto", "reference"):
        with pytest.raises(error, match=message):
            lse(**({"backend": backend} | changes))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"v": None}, TypeError, "v must be a tensor"),
        ({"positives": -1}, ValueError, "positives is -1; expected 0 to 5, the column of row 0"),
        ({"positives": 6}, ValueError, "positives is 6; expected 0 to 5"),
        ({"positives": 0.0}, TypeError, "positives must be an int or None, not float"),
        ({"positives": True}, TypeError, "positives must be an int or None, not bool"),
        ({"positives": 3}, ValueError, "positives=3 puts row 3's positive past the last of v's 6"),
        ({"positives": 0, "row_bias": torch.ones(4)}, ValueError, "row_bias has no effect"),
        ({"positives": 0, "add_zero": True}, ValueError, "add_zero stands for a positive"),
        ({"weights": torch.ones(5)}, ValueError, r"weights .*shape \[4\]"),
        ({"divisor": 0}, ValueError, "divisor is 0; expected a count"),
        ({"divisor": np.int64(0)}, ValueError, "divisor is 0; expected a count"),
        ({"divisor": np.float32(1)}, ValueError, "divisor is 1.0; expected a count"),
    ],
)
def test_weighted_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for backend in ("auto", "reference"):
        with pytest.raises(error, match=message):
            fastcl.similarity_weighted_logsumexp(**{"u": U, "v": V, "backend": backend} | options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"v": None}, TypeError, "v must be a tensor"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \[4\]; expected a float"),
        ({"positives": -1}, ValueError, "positives is -1; expected 0 to 5, the column of row 0"),
        ({"positives": 6}, ValueError, "positives is 6; expected 0 to 5"),
        ({"positives": 0.0}, TypeError, "positives must be an int or None, not float"),
        ({"positives": True}, TypeError, "positives must be an int or None, not bool"),
        ({"reduction": "mean"}, ValueError, "reduction='mean' is not known; choose one of sum"),
        ({"divisor": 1.5}, ValueError, "divisor is 1.5"),
    ],
)
def test_sigmoid_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"u": U, "v": V, "scale": 1.0, "bias": 0.0} | options
    for backend in ("auto", "reference"):
        with pytest.raises(error, match=message):
            fastcl.similarity_sigmoid(**given, backend=backend)


@pytest.mark.parametrize(
    ("a", "b", "dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_dtypes_are_promoted(a: torch.dtype, b: torch.dtype, dtype: torch.dtype) -> None:
    u, v = U.to(a, copy=True).requires_grad_(), V.to(b, copy=True).requires_grad_()
    rows = lse(u=u, v=v)
    assert torch.equal(rows, lse(u=u.to(dtype), v=v.to(dtype)))
    rows.sum().backward()
    assert (u.grad.dtype, v.grad.dtype) == (a, b)


@pytest.mark.parametrize(
    "scale", [2.0, 2, torch.tensor(2.0), torch.tensor([2.0]), torch.full((4,), 2.0)]
)
def test_every_form_of_scale_is_the_same(scale: float | Tensor) -> None:
    expected = lse(scale=torch.tensor(2.0), dim="both")
    if isinstance(scale, Tensor):
        scale.requires_grad_()
    rows, cols = lse(scale=scale, dim="both")
    assert torch.equal(rows, expected[0])
    assert torch.equal(cols, expected[1])
    if isinstance(scale, Tensor):
        (rows.sum() + cols.sum()).backward()
        assert scale.grad is not None
        assert scale.grad.shape == scale.shape


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_numpy_scalars_are_numbers(backend: str) -> None:
    how = {"backend": backend, "workspace": 1 << 20}
    of_numpy = {"backend": backend, "workspace": np.int64(1 << 20)}
    for given in (np.float32(2), np.float64(2), np.float16(2), np.longdouble(2), np.int32(2)):
        assert torch.equal(lse(scale=given, **of_numpy), lse(scale=2.0, **how))
    one = np.int64(1)
    assert torch.equal(lse(mask_diagonal=one, **of_numpy), lse(mask_diagonal=1, **how))
    weighted, sigmoid = fastcl.similarity_weighted_logsumexp, fastcl.similarity_sigmoid
    assert torch.equal(
        weighted(U, V, positives=one, divisor=np.int64(3), **of_numpy),
        weighted(U, V, positives=1, divisor=3, **how),
    )
    for reduction in ("sum", "rows"):
        assert torch.equal(
            sigmoid(U, V, scale=np.float32(2), bias=np.float32(-1), positives=one,
                    divisor=np.uint8(3), reduction=reduction, **of_numpy),
            sigmoid(U, V, scale=2.0, bias=-1.0, positives=1,
                    divisor=3, reduction=reduction, **how),
        )  # fmt: skip


def test_pair_statistics_has_no_reference() -> None:
    with pytest.raises(ValueError, match="does not have"):
        pair_statistics(U, V, scale=1.0, backend="reference")
