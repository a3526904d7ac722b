"""The softmax losses as modules."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastcl import functional
from fastcl.distributed.ranks import Mode
from fastcl.distributed.team import Group
from fastcl.functional.common import Reduction
from fastcl.losses.common import Loss, TemperatureLoss, check_flag
from fastcl.similarity.inputs import check_choice


class InfoNCELoss(TemperatureLoss):
    """InfoNCE as a module; see :func:`fastcl.info_nce` for formula, shapes and errors.

    Args:
        temperature: tau > 0, or its starting value with `learn_temperature`.
        learn_temperature: make ``log_temperature`` a parameter.
        negative_mode, in_batch, symmetric, reduction, normalize: as for :func:`fastcl.info_nce`.
        group, mode, reduce_dtype, backend, workspace: likewise.

    Example:
        >>> import fastcl, torch
        >>> loss = fastcl.losses.InfoNCELoss(temperature=0.07, normalize=True)
        >>> loss(torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)).backward()

    Source: van den Oord et al. 2018, eq. 4.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "negative_mode": "unpaired",
        "in_batch": None,
        "symmetric": False,
        **Loss.defaults,
    }

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learn_temperature: bool = False,
        negative_mode: Literal["unpaired", "paired"] = "unpaired",
        in_batch: bool | None = None,
        symmetric: bool = False,
        reduction: Reduction = "mean",
        normalize: bool = False,
        group: Group | None = None,
        mode: Mode = "auto",
        reduce_dtype: torch.dtype | None = None,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(
            temperature,
            learn_temperature,
            reduction=reduction,
            normalize=normalize,
            group=group,
            mode=mode,
            reduce_dtype=reduce_dtype,
            backend=backend,
            workspace=workspace,
        )
        check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
        if in_batch is not None:
            check_flag("in_batch", in_batch)
        check_flag("symmetric", symmetric)
        self.negative_mode = negative_mode
        self.in_batch = in_batch
        self.symmetric = symmetric

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of queries [N, D] against their positive keys and negatives."""
        return functional.info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            ids=ids,
            **self.options,
        )


class NTXentLoss(TemperatureLoss):
    """NT-Xent (SimCLR) as a module; see :func:`fastcl.nt_xent` for formula, shapes and errors.

    Args:
        temperature: tau > 0, or its starting value with `learn_temperature`.
        learn_temperature: make ``log_temperature`` a parameter.
        reduction, normalize, group, mode, reduce_dtype, backend, workspace: as for
            :func:`fastcl.nt_xent`.

    Example:
        >>> import fastcl, torch
        >>> loss = fastcl.losses.NTXentLoss(temperature=0.5, normalize=True)
        >>> loss(torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)).backward()

    Source: Chen et al. 2020 (SimCLR), eq. 1.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        learn_temperature: bool = False,
        reduction: Reduction = "mean",
        normalize: bool = False,
        group: Group | None = None,
        mode: Mode = "auto",
        reduce_dtype: torch.dtype | None = None,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(
            temperature,
            learn_temperature,
            reduction=reduction,
            normalize=normalize,
            group=group,
            mode=mode,
            reduce_dtype=reduce_dtype,
            backend=backend,
            workspace=workspace,
        )

    def forward(self, z0: Tensor, z1: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """The loss of two views [N, D] of the same samples."""
        return functional.nt_xent(
            z0,
            z1,
            temperature=self.temperature,
            ids=ids,
            **self.options,
        )


class ClipLoss(Loss):
    """CLIP's symmetric loss as a module; see :func:`fastcl.clip_loss` for formula and errors.

    The scale is the model's parameter and is passed to each call, already exponentiated.

    Args:
        reduction, normalize, group, mode, reduce_dtype, backend, workspace: as for
            :func:`fastcl.clip_loss`.

    Example:
        >>> import fastcl, torch
        >>> loss = fastcl.losses.ClipLoss(normalize=True)
        >>> loss(torch.randn(8, 4, requires_grad=True), torch.randn(8, 4), 14.3).backward()

    Source: Radford et al. 2021, figure 3.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of paired features [N, D]."""
        return functional.clip_loss(
            image_features,
            text_features,
            logit_scale,
            ids=ids,
            **self.options,
        )
