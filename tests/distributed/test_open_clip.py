"""The open_clip stand-ins on several ranks: every setting gives the exact gradient."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastcl
from fastcl.compat import open_clip
from tests.distributed.crew import Crew
from tests.distributed.work import rows_of, unit_rows

CrewOf = Callable[[int], Crew]
CLIP = [
    {"local_loss": local, "gather_with_grad": grad}
    for local, grad in itertools.product((False, True), repeat=2)
]
SIGLIP = [{"dist_impl": impl} for impl in (None, "bidir", "shift", "reduce", "gather")]


def towers(n: int) -> tuple[Tensor, ...]:
    scale, bias = (torch.tensor([x], dtype=torch.float64) for x in (10.0, -5.0))
    return unit_rows(n, seed=0).detach(), unit_rows(n, seed=1).detach(), scale, bias


def stand_in(kind: str, options: dict[str, Any], counts: tuple[int, ...]) -> dict[str, Any]:
    """What one rank gets, called as open_clip's trainer calls it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = rows_of(counts, rank)
    made = {"clip": open_clip.ClipLoss, "siglip": open_clip.SigLipLoss}[kind]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        open_clip._said.clear()
        loss = made(rank=rank, world_size=size, cache_labels=True, **options)
        made(rank=rank, world_size=size, **options)  # says it no second time
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    local = [x[rows] if len(x) > 1 else x for x in towers(sum(counts))]
    leaves = [x.clone().requires_grad_() for x in local]
    out = loss(**dict(zip(names, leaves, strict=True)), output_dict=True)["contrastive_loss"]
    out.backward()
    return {
        "loss": out.detach(),
        "grads": [x.grad for x in leaves],
        "said": [str(w.message) for w in said],
        "repr": repr(loss),
    }


@pytest.mark.parametrize("counts", [(3, 3), (2, 4, 1)], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [*(("clip", o) for o in CLIP), *(("siglip", o) for o in SIGLIP)],
    ids=str,
)
def test_every_setting(
    crew_of: CrewOf, kind: str, options: dict[str, Any], counts: tuple[int, ...]
) -> None:
    u, v, scale, bias = (x.requires_grad_() for x in towers(sum(counts)))
    if kind == "clip":
        expected = fastcl.reference.clip_loss(u, v, scale)
        expected = expected + 0.0 * bias.sum()
    else:
        expected = fastcl.reference.siglip_loss(u, v, scale, bias)
    expected.backward()
    size = len(counts)
    found = crew_of(size).run(stand_in, kind, options, counts)
    losses = torch.stack([x["loss"] for x in found])
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    if options.get("local_loss") is False:
        assert losses.tolist() == pytest.approx([expected.item()] * size, rel=1e-12)
    image, text, of_scale, of_bias = zip(*(x["grads"] for x in found), strict=True)
    torch.testing.assert_close(torch.cat(image) / size, u.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat(text) / size, v.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(of_scale) / size, scale.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(of_bias) / size, bias.grad, rtol=1e-10, atol=1e-10)


def test_what_open_clip_would_have_given_is_said_once(crew_of: CrewOf) -> None:
    for options in CLIP:
        first, second = crew_of(2).run(stand_in, "clip", options, (3, 3))
        assert second["said"] == []
        if options["gather_with_grad"]:
            assert first["said"] == []
        else:
            (message,) = first["said"]
            assert f"local_loss={options['local_loss']}, gather_with_grad=False" in message
            assert ("lack" if options["local_loss"] else "1/2 of the exact") in message
    assert first["repr"] == "ClipLoss(rank=0, world_size=2)"


def wrong_rank() -> None:
    u, v, scale, _ = towers(3)
    open_clip.ClipLoss(rank=0, world_size=3, gather_with_grad=True)(u, v, scale)


def test_a_rank_that_is_another(crew_of: CrewOf) -> None:
    for rank, outcome in enumerate(crew_of(2).outcomes(wrong_rank)):
        expected = f"torch.distributed says rank={rank}, world_size=2: pass these"
        assert expected in str(outcome.error)  # type: ignore[union-attr]
