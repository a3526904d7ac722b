"""The open_clip stand-ins against the formulas of its loss.py, called as its trainer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.compat.open_clip import ClipLoss, SigLipLoss


def features() -> dict[str, Tensor]:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(12, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    return {"image_features": image, "text_features": text}


def clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def gradients(loss: Any, out: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = {name: x.clone().requires_grad_() for name, x in out.items()}
    value = loss(**leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves.values()]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_same_loss_and_gradients(kind: str, shape: tuple[int, ...]) -> None:
    out = features() | {"logit_scale": torch.full(shape, 14.3, dtype=torch.float64)}
    if kind == "siglip":
        out["logit_bias"] = torch.full(shape, -10.0, dtype=torch.float64)
    ours = ClipLoss() if kind == "clip" else SigLipLoss()
    value, grads = gradients(ours, out)
    expected, expected_grads = gradients(clip if kind == "clip" else siglip, out)
    assert value.shape == ()
    torch.testing.assert_close(value, expected.reshape(()), rtol=1e-12, atol=1e-12)
    for given, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(given, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
def test_called_as_the_trainer_calls_it(loss: Any) -> None:
    model_out = features() | {
        "logit_scale": torch.tensor(14.3, dtype=torch.float64),
        "logit_bias": torch.tensor(-10.0, dtype=torch.float64),
    }
    losses = loss(**model_out, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    assert torch.equal(losses["contrastive_loss"], loss(**model_out))
    positional = loss(*model_out.values())
    assert torch.equal(losses["contrastive_loss"], positional)


def test_clip_bias_is_in_the_graph_with_gradient_zero() -> None:
    bias = torch.tensor(-10.0, requires_grad=True)
    scale = torch.tensor(14.3)
    with_bias = ClipLoss()(**features(), logit_scale=scale, logit_bias=bias)
    assert torch.equal(with_bias, ClipLoss()(**features(), logit_scale=scale))
    with_bias.backward()
    assert bias.grad == 0  # DDP waits for it


def test_signatures_are_open_clips() -> None:
    ClipLoss(local_loss=False, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    for impl in (None, "bidir", "shift", "reduce", "gather"):
        SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl=impl, chunk_size=8)
    with pytest.raises(ValueError, match="dist_impl='ring' is not known; choose one of bidir"):
        SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_ranks_that_there_are_not(loss: Any) -> None:
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank={rank}, world_size={size}; expected"):
            loss(rank=rank, world_size=size)
    out = features() | {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(0.0)}
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first"):
        loss(rank=1, world_size=2)(**out)


def test_backend_options_are_passed_on() -> None:
    loss = ClipLoss(backend="reference")
    torch.testing.assert_close(
        loss(**features(), logit_scale=14.3), ClipLoss()(**features(), logit_scale=14.3)
    )
    assert repr(loss) == "ClipLoss(backend='reference')"


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_bad_options_are_refused_when_made(loss: Any) -> None:
    with pytest.raises(ValueError, match="backend='gpu'"):
        loss(backend="gpu")
    with pytest.raises(ValueError, match="workspace is 1000 bytes"):
        loss(workspace=1000)
