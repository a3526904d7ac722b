"""The GradCache stand-in: called as the package is, and exact where that is not."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.compat.grad_cache import GradCache


class Encoder(nn.Module):
    """Of a tensor, of arguments, or of keyword arguments."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()

    def forward(self, x: Tensor, y: Tensor | None = None, note: str = "") -> dict[str, Tensor]:
        return {"rep": self.layers(x if y is None else x * y)}


def loss(z0: Tensor, z1: Tensor, temperature: float = 0.1) -> Tensor:
    return fastcl.info_nce(z0, z1, temperature=temperature, normalize=True)


def rep(out: dict[str, Tensor]) -> Tensor:
    return out["rep"]


X, Y = (torch.randn(11, 6, dtype=torch.float64) for _ in range(2))
INPUTS: dict[str, Any] = {
    "tensor": X * Y,
    "list": [X, Y],
    "dict": {"x": X, "y": Y, "note": "not a tensor"},
    "mapping": UserDict({"x": X, "y": Y}),
    "both": ([X], {"y": Y, "note": "more"}),
}


def right(**options: Any) -> tuple[Tensor, list[Tensor]]:
    models = [Encoder(0), Encoder(1)]
    value = loss(models[0](X * Y)["rep"], models[1](X)["rep"], **options)
    value.backward()
    return value.detach(), [p.grad for m in models for p in m.parameters()]


@pytest.mark.parametrize("chunks", [1, 4, [3, 11], 50])
@pytest.mark.parametrize("given", INPUTS)
def test_called_as_the_package_is(given: str, chunks: Any) -> None:
    models = [Encoder(0), Encoder(1)]
    gc = GradCache(models=models, chunk_sizes=chunks, loss_fn=loss, get_rep_fn=rep)
    value = gc(INPUTS[given], X, no_sync_except_last=True, temperature=0.2)
    expected, grads = right(temperature=0.2)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected)
    for found, grad in zip((p.grad for m in models for p in m.parameters()), grads, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)


def test_a_split_of_ones_own() -> None:
    """Into chunks of sizes that it chooses."""
    models, asked = [Encoder(0), Encoder(1)], []

    def split(given: Tensor, size: int) -> list[Tensor]:
        asked.append(size)
        return list(given.split([size, 2, len(given) - size - 2]))

    gc = GradCache(models, [4, 5], loss, split_input_fn=split, get_rep_fn=rep)
    torch.testing.assert_close(gc(X * Y, X), right()[0])
    assert asked == [4, 5]
    for found, grad in zip(
        (p.grad for m in models for p in m.parameters()), right()[1], strict=True
    ):
        torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)


def test_half_precision_with_a_scaler() -> None:
    models = [Encoder(0).float(), Encoder(1).float()]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    gc = GradCache(models, 4, loss, get_rep_fn=rep, fp16=True, scaler=scaler)
    value = gc(X.float() * Y.float(), X.float())
    torch.testing.assert_close(value.double(), right()[0], rtol=1e-2, atol=1e-2)
    found = torch.cat([p.grad.reshape(-1) / 256 for m in models for p in m.parameters()]).double()
    expected = torch.cat([grad.reshape(-1) for grad in right()[1]])
    assert torch.cosine_similarity(found, expected, dim=0) > 0.999


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="fp16=True needs a scaler"):
        GradCache([Encoder(0)], 4, loss, fp16=True)
    with pytest.raises(ValueError, match="chunk_sizes has 1 numbers for 2 encoders"):
        GradCache([Encoder(0), Encoder(1)], [4], loss)
    with pytest.raises(ValueError, match="chunk_size is 0; expected a number of rows"):
        GradCache([Encoder(0)], 0, loss)
    with pytest.raises(ValueError, match="1 inputs for 2 models"):
        GradCache([Encoder(0), Encoder(1)], 4, loss)(X)
    with pytest.raises(ValueError, match="split_input_fn returned no chunk"):
        GradCache([Encoder(0)], 4, loss, split_input_fn=lambda x, size: [])(X)
