"""Modules are the functions with their options kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastcl

A, B = torch.randn(6, 4), torch.randn(6, 4)
IDS = torch.tensor([0, 1, 0, 2, 3, 4])


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "normalize": True}])
@pytest.mark.parametrize(
    ("module", "function", "given"),
    [
        (fastcl.losses.InfoNCELoss, fastcl.info_nce, ()),
        (fastcl.losses.NTXentLoss, fastcl.nt_xent, ()),
        (fastcl.losses.ClipLoss, fastcl.clip_loss, (7.0,)),
        (fastcl.losses.SigLipLoss, fastcl.siglip_loss, (7.0, -5.0)),
    ],
)
def test_module_equals_function(
    module: Any, function: Any, given: tuple[float, ...], options: dict[str, Any]
) -> None:
    expected = function(A, B, *given, ids=IDS, **options)
    assert torch.equal(module(**options)(A, B, *given, ids=IDS), expected)


def test_info_nce_options() -> None:
    queue = torch.randn(9, 4)
    loss = fastcl.losses.InfoNCELoss(0.3, in_batch=True)
    assert torch.equal(
        loss(A, B, queue), fastcl.info_nce(A, B, queue, temperature=0.3, in_batch=True)
    )
    symmetric = fastcl.losses.InfoNCELoss(0.3, symmetric=True)
    assert torch.equal(symmetric(A, B), fastcl.info_nce(A, B, temperature=0.3, symmetric=True))
    paired = fastcl.losses.InfoNCELoss(negative_mode="paired")
    own = torch.randn(6, 2, 4)
    assert torch.equal(paired(A, B, own), fastcl.info_nce(A, B, own, negative_mode="paired"))


def test_numpy_scalars_are_numbers() -> None:
    given = fastcl.losses.NTXentLoss(np.float32(0.5), workspace=np.int64(1 << 20))
    assert repr(given) == repr(fastcl.losses.NTXentLoss(0.5, workspace=1 << 20))


@pytest.mark.parametrize("module", [fastcl.losses.InfoNCELoss, fastcl.losses.NTXentLoss])
def test_learned_temperature(module: Any) -> None:
    fixed, learned = module(0.2), module(0.2, learn_temperature=True)
    assert list(fixed.parameters()) == []
    assert [name for name, _ in learned.named_parameters()] == ["log_temperature"]
    torch.testing.assert_close(learned(A, B), fixed(A, B))
    learned(A, B).backward()
    step = 1e-2
    higher, lower = (
        module(0.2 * torch.tensor(x).exp().item())(A.double(), B.double()) for x in (step, -step)
    )
    slope = (higher - lower) / (2 * step)
    torch.testing.assert_close(learned.log_temperature.grad.double(), slope, rtol=1e-3, atol=1e-6)


def test_state_is_kept() -> None:
    trained = fastcl.losses.InfoNCELoss(0.2, learn_temperature=True)
    with torch.no_grad():
        trained.log_temperature += 0.5
    fresh = fastcl.losses.InfoNCELoss(0.9, learn_temperature=True)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(A, B), trained(A, B))


def test_repr_says_what_differs() -> None:
    assert repr(fastcl.losses.ClipLoss()) == "ClipLoss()"
    shown = repr(fastcl.losses.NTXentLoss(0.2, learn_temperature=True, backend="torch"))
    assert shown == "NTXentLoss(temperature=0.2, learn_temperature=True, backend='torch')"
    shown = repr(fastcl.losses.InfoNCELoss(negative_mode="paired", in_batch=True))
    assert shown == "InfoNCELoss(temperature=0.1, negative_mode='paired', in_batch=True)"
    assert repr(fastcl.losses.InfoNCELoss(symmetric=True)).endswith("symmetric=True)")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature is 0; expected a positive number"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf; expected a positive"),
        (
            {"temperature": torch.tensor(0.1)},
            TypeError,
            "temperature must be a number, not Tensor; learn_temperature=True",
        ),
        ({"learn_temperature": 0.1}, TypeError, "learn_temperature must be True or False, not 0.1"),
        ({"reduction": "avg"}, ValueError, "reduction='avg' is not known"),
        ({"normalize": "yes"}, TypeError, "normalize must be True or False, not 'yes'"),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is not known"),
        ({"workspace": 1.5}, TypeError, "workspace must be a number of bytes"),
        ({"workspace": 1000}, ValueError, "workspace is 1000 bytes; expected at least 65536"),
        ({"negative_mode": "own"}, ValueError, "negative_mode='own' is not known"),
        ({"in_batch": "both"}, TypeError, "in_batch must be True or False, not 'both'"),
        ({"symmetric": 2}, TypeError, "symmetric must be True or False, not 2"),
    ],
)
def test_bad_options_are_refused_when_made(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastcl.losses.InfoNCELoss(**options)
