"""Losses across ranks, ours and others', each beside its own form for one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastcl
from benchmarks import peers

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the rows of two towers (unit vectors), a logit scale and a logit bias."""
Pair = tuple[Loss, Loss]
FASTCL = "fastcl"
RESTATED = "open_clip restated"
TWO_SIDED_SETTING = "local_loss=True, gather_with_grad=True"  # the one that is right
TEMPERATURE = 0.1  # where a library wants a number and learns none


@dataclass(frozen=True)
class Subject:
    """One loss of a library in one of its settings; `family` is what fastcl calls that loss.

    `build(rank, size)`: the loss of this rank's rows, and the loss of all rows in one process.
    `learns`: which of scale and bias get a gradient.
    """

    library: str
    family: str
    loss: str
    setting: str
    build: Callable[[int, int], Pair]
    learns: tuple[str, ...] = ()


def _clip(a: Tensor, b: Tensor, scale: Tensor, _: Tensor, **how: Any) -> Tensor:
    return fastcl.clip_loss(a, b, scale, **how)


def _siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, **how: Any) -> Tensor:
    return fastcl.siglip_loss(a, b, scale, bias, **how)


def _nt_xent(a: Tensor, b: Tensor, scale: Tensor, _: Tensor, **how: Any) -> Tensor:
    return fastcl.nt_xent(a, b, temperature=1 / scale, **how)


def _info_nce(a: Tensor, b: Tensor, scale: Tensor, _: Tensor, **how: Any) -> Tensor:
    return fastcl.info_nce(a, b, temperature=1 / scale, **how)


OURS: dict[str, Callable[..., Tensor]] = {
    "clip": _clip,
    "siglip": _siglip,
    "nt_xent": _nt_xent,
    "info_nce": _info_nce,
}


def ours(loss: str, setting: str, **how: Any) -> Subject:
    """One of fastcl's losses, with those options."""

    def build(rank: int, size: int) -> Pair:
        function = OURS[loss]
        across = partial(function, group=dist.group.WORLD, **how)
        return across, partial(function, backend="reference")

    learns = ("scale", "bias") if loss == "siglip" else ("scale",)
    return Subject(FASTCL, loss, loss, setting, build, learns)


def open_clip(local_loss: bool, gather_with_grad: bool) -> Subject:
    """open_clip's ClipLoss in one of its four settings."""

    def build(rank: int, size: int) -> Pair:
        make = peers.load("open_clip").ClipLoss
        how = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        across, alone = make(rank=rank, world_size=size, **how), make()
        return (lambda a, b, t, _: across(a, b, t)), (lambda a, b, t, _: alone(a, b, t))

    setting = f"local_loss={local_loss}, gather_with_grad={gather_with_grad}"
    return Subject("open_clip", "clip", "ClipLoss", setting, build, ("scale",))


def open_clip_restated() -> Subject:
    """The setting of open_clip's ClipLoss that is right, where open_clip is not there."""

    def build(rank: int, size: int) -> Pair:
        def alone(a: Tensor, b: Tensor, scale: Tensor, _: Tensor) -> Tensor:
            return fastcl.reference.clip_loss(a, b, scale)

        return (lambda a, b, t, _: peers.two_sided_clip(a, b, t)), alone

    return Subject(RESTATED, "clip", "ClipLoss", TWO_SIDED_SETTING, build, ("scale",))


def open_clip_sigmoid(how: str) -> Subject:
    """open_clip's SigLipLoss, whose texts travel in that way."""

    def build(rank: int, size: int) -> Pair:
        make = peers.load("open_clip").SigLipLoss
        return make(rank=rank, world_size=size, dist_impl=how), make()

    return Subject(
        "open_clip", "siglip", "SigLipLoss", f"dist_impl={how}", build, ("scale", "bias")
    )


def _metric_learning(efficient: bool) -> Subject:
    def build(rank: int, size: int) -> Pair:
        wrapper = peers.load("pytorch_metric_learning").DistributedLossWrapper
        from pytorch_metric_learning.losses import NTXentLoss  # type: ignore[import-not-found]

        def loss(function: Any, first: int) -> Loss:
            def of_pairs(a: Tensor, b: Tensor, *_: Tensor) -> Tensor:
                labels = torch.arange(len(a)) + first * len(a)  # of a sample, in both its views
                value: Tensor = function(torch.cat([a, b]), torch.cat([labels, labels]))
                return value

            return of_pairs

        alone = NTXentLoss(temperature=TEMPERATURE)
        return loss(wrapper(alone, efficient=efficient), rank), loss(alone, 0)

    setting = f"distributed wrapper, efficient={efficient}"
    return Subject("pytorch_metric_learning", "nt_xent", "NTXentLoss", setting, build)


def _gradcache() -> Subject:
    def build(rank: int, size: int) -> Pair:
        module = peers.load("gradcache")
        across, alone = module.DistributedContrastiveLoss(), module.SimpleContrastiveLoss()
        return (
            lambda a, b, *_: across(a / TEMPERATURE, b),
            lambda a, b, *_: alone(a / TEMPERATURE, b),
        )

    return Subject("gradcache", "info_nce", "DistributedContrastiveLoss", "", build)


def lightly() -> Subject:
    """Lightly's NT-Xent."""

    def build(rank: int, size: int) -> Pair:
        make = peers.load("lightly").NTXentLoss
        across, alone = make(TEMPERATURE, gather_distributed=True), make(TEMPERATURE)
        return (lambda a, b, *_: across(a, b)), (lambda a, b, *_: alone(a, b))

    return Subject("lightly", "nt_xent", "NTXentLoss", "gather_distributed=True", build)


SUBJECTS = (
    *(ours(loss, mode, mode=mode) for loss in OURS for mode in ("gather", "ring")),
    ours("clip", "gather, bfloat16", mode="gather", reduce_dtype=torch.bfloat16),
    ours("clip", "ring, bfloat16", mode="ring", reduce_dtype=torch.bfloat16),
    *(open_clip(local, grad) for local in (False, True) for grad in (False, True)),
    open_clip_restated(),
    *(open_clip_sigmoid(how) for how in ("bidir", "shift", "reduce", "gather")),
    *(_metric_learning(efficient) for efficient in (True, False)),
    _gradcache(),
    lightly(),
)
