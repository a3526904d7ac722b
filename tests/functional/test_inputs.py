"""What the losses refuse, and the forms in which they take a temperature or a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcl
from tests.cases import LOSSES, Case

Q, K = torch.randn(4, 3), torch.randn(4, 3)


def info_nce(*args: Any, **options: Any) -> Tensor:
    return fastcl.info_nce(Q, K, *args, **options)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((), {"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive number"),
        ((), {"temperature": np.float32(0)}, ValueError, "temperature is 0.0; expected a positive"),
        ((), {"temperature": np.True_}, TypeError, "temperature must be a float .* not bool"),
        ((), {"temperature": -1}, ValueError, "temperature is -1; expected a positive"),
        ((), {"temperature": torch.ones(4)}, ValueError, r"temperature has shape \[4\]"),
        ((), {"reduction": "avg"}, ValueError, "reduction='avg' is not known"),
        ((), {"negative_mode": "both"}, ValueError, "negative_mode='both' is not known"),
        ((), {"in_batch": False}, ValueError, "in_batch=False without negative_keys leaves no"),
        ((), {"negative_mode": "paired"}, ValueError, '"paired" has no meaning without negative_k'),
        (
            (),
            {"negative_mode": "paired", "in_batch": True},
            ValueError,
            '"paired" has no meaning without negative_keys',
        ),
        ((K,), {"symmetric": True}, ValueError, "symmetric=True has no meaning with negative_keys"),
        ((K,), {"ids": torch.arange(4)}, ValueError, "ids mark in-batch false negatives"),
        (([1.0],), {}, TypeError, "negative_keys must be a tensor, not list"),
        ((K[None],), {}, ValueError, r'has shape \[1, 4, 3\]; expected \[M, D\].*"paired"'),
        ((K[:, :2],), {}, ValueError, "query has dimension 3 and negative_keys has 2"),
        (
            (K,),
            {"negative_mode": "paired"},
            ValueError,
            r"negative_keys has shape \[4, 3\]; expected \[4, M, 3\]",
        ),
        (
            (torch.ones(4, 0, 3),),
            {"negative_mode": "paired"},
            ValueError,
            r"no negatives \(M = 0\)",
        ),
        (
            (torch.ones(4, 2, 3).int(),),
            {"negative_mode": "paired"},
            TypeError,
            "negative_keys has dtype torch.int32; expected one of float32, bfloat16",
        ),
        (
            (torch.ones(4, 2, 3, device="meta"),),
            {"negative_mode": "paired"},
            ValueError,
            "query is on cpu and negative_keys on meta",
        ),
        ((), {"ids": torch.arange(3)}, ValueError, r"ids has shape \[3\]; expected \[4\]"),
    ],
)
def test_info_nce_refuses(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    info_nce()
    with pytest.raises(error, match=message):
        info_nce(*args, **options)


def test_the_module_refuses_paired_without_negatives_too() -> None:
    loss = fastcl.losses.InfoNCELoss(negative_mode="paired")
    with pytest.raises(ValueError, match='"paired" has no meaning without negative_keys'):
        loss(Q, K)
    assert loss(Q, K, torch.randn(4, 2, 3)).isfinite()


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (lambda a, b: fastcl.info_nce(a, b), ("query", "positive_key")),
        (lambda a, b: fastcl.clip_loss(a, b, 1.0), ("image_features", "text_features")),
        (lambda a, b: fastcl.siglip_loss(a, b, 1.0, 0.0), ("image_features", "text_features")),
        (lambda a, b: fastcl.nt_xent(a, b), ("z0", "z1")),
    ],
)
def test_paired_rows_are_required(loss: Any, names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{names[0]} has 4 rows and {names[1]} has 3"):
        loss(Q, K[:3])
    with pytest.raises(ValueError, match=f"{names[0]} is empty"):
        loss(Q[:0], K[:0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "form", [float, np.float32, np.float64, torch.tensor, lambda x: torch.tensor([x])]
)
def test_scale_as_number_or_tensor(form: Any, reduction: Any) -> None:
    for loss, arguments in (
        (fastcl.info_nce, {"temperature": 0.2}),
        (fastcl.nt_xent, {"temperature": 0.2}),
        (fastcl.clip_loss, {"logit_scale": 5.0}),
        (fastcl.siglip_loss, {"logit_scale": 5.0, "logit_bias": -3.0}),
    ):
        given = {name: form(value) for name, value in arguments.items()}
        for x in given.values():
            if isinstance(x, Tensor):
                x.requires_grad_()
        value = loss(Q, K, reduction=reduction, **given)
        torch.testing.assert_close(value, loss(Q, K, reduction=reduction, **arguments))
        assert value.dim() == (reduction == "none")
        for x in given.values():
            if isinstance(x, Tensor):
                (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
                assert gradient.shape == x.shape
                assert gradient != 0


def test_reductions_agree() -> None:
    for loss in (
        lambda **how: fastcl.info_nce(Q, K, **how),
        lambda **how: fastcl.info_nce(Q, K, K[:2], **how),
        lambda **how: fastcl.clip_loss(Q, K, 5.0, **how),
        lambda **how: fastcl.siglip_loss(Q, K, 5.0, -3.0, **how),
        lambda **how: fastcl.nt_xent(Q, K, **how),
    ):
        values = loss(reduction="none")
        torch.testing.assert_close(values.mean(), loss())
        torch.testing.assert_close(values.sum(), loss(reduction="sum"))


def test_normalize_is_normalizing_first() -> None:
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (Q, K))
    torch.testing.assert_close(info_nce(normalize=True), fastcl.info_nce(q, k))
    torch.testing.assert_close(
        info_nce(3 * K, normalize=True), fastcl.info_nce(q, k, k), msg="negative_keys too"
    )
    torch.testing.assert_close(fastcl.nt_xent(Q, K, normalize=True), fastcl.nt_xent(q, k))
    torch.testing.assert_close(
        fastcl.clip_loss(Q, K, 5.0, normalize=True), fastcl.clip_loss(q, k, 5.0)
    )
    torch.testing.assert_close(
        fastcl.siglip_loss(Q, K, 5.0, -3.0, normalize=True), fastcl.siglip_loss(q, k, 5.0, -3.0)
    )


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_the_reference_checks_the_workspace_too(case: Case) -> None:
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="workspace is 5 bytes"):
            case.ours(**case.tensors(), **case.options, backend=backend, workspace=5)
