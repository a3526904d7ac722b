"""The softmax losses as modules."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastcl import functional
from fastcl.functional.common import REDUCTIONS, Reduction
from fastcl.kernels.dispatch import check_name
from fastcl.similarity.inputs import check_choice


class _Loss(nn.Module):
    """The options that every loss shares."""

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        normalize: bool = False,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_name(backend)
        self.reduction: Reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.workspace = workspace

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        shown = {"reduction": "mean", "normalize": False, "backend": "auto", "workspace": None}
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name, default in shown.items()
            if getattr(self, name) != default
        )


class _TemperatureLoss(_Loss):
    """A loss with a temperature of its own, fixed or learned.

    A learned temperature is a parameter ``log_temperature``, so that it stays positive.
    """

    def __init__(
        self,
        temperature: float,
        *,
        learn_temperature: bool = False,
        reduction: Reduction = "mean",
        normalize: bool = False,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(
            reduction=reduction, normalize=normalize, backend=backend, workspace=workspace
        )
        if not temperature > 0:
            raise ValueError(
                f"temperature is {temperature}; expected a positive number such as 0.07"
            )
        self._temperature = float(temperature)
        self.log_temperature: nn.Parameter | None = None
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(self._temperature).log())

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or a 0-dim tensor with a gradient where it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def extra_repr(self) -> str:
        """The temperature it started from, and the options."""
        learned = ", learn_temperature=True" if self.log_temperature is not None else ""
        rest = super().extra_repr()
        return f"temperature={self._temperature}{learned}" + (f", {rest}" if rest else "")


class InfoNCELoss(_TemperatureLoss):
    """InfoNCE as a module; see :func:`fastcl.info_nce` for formula, shapes and errors.

    Args:
        temperature: tau > 0, or its starting value with `learn_temperature`.
        learn_temperature: make ``log_temperature`` a parameter.
        negative_mode, in_batch, symmetric, reduction, normalize, backend, workspace: as for
            :func:`fastcl.info_nce`.

    Example:
        >>> import fastcl, torch
        >>> loss = fastcl.losses.InfoNCELoss(temperature=0.07, normalize=True)
        >>> loss(torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)).backward()

    Source: van den Oord et al. 2018, eq. 4.
    """

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
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(
            temperature,
            learn_temperature=learn_temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            workspace=workspace,
        )
        check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
        self.negative_mode: Literal["unpaired", "paired"] = negative_mode
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
            negative_mode=self.negative_mode,
            in_batch=self.in_batch,
            symmetric=self.symmetric,
            ids=ids,
            reduction=self.reduction,
            normalize=self.normalize,
            backend=self.backend,
            workspace=self.workspace,
        )


class NTXentLoss(_TemperatureLoss):
    """NT-Xent (SimCLR) as a module; see :func:`fastcl.nt_xent` for formula, shapes and errors.

    Args:
        temperature: tau > 0, or its starting value with `learn_temperature`.
        learn_temperature: make ``log_temperature`` a parameter.
        reduction, normalize, backend, workspace: as for :func:`fastcl.nt_xent`.

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
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(
            temperature,
            learn_temperature=learn_temperature,
            reduction=reduction,
            normalize=normalize,
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
            reduction=self.reduction,
            normalize=self.normalize,
            backend=self.backend,
            workspace=self.workspace,
        )


class ClipLoss(_Loss):
    """CLIP's symmetric loss as a module; see :func:`fastcl.clip_loss` for formula and errors.

    The scale is the model's parameter and is passed to each call, already exponentiated.

    Args:
        reduction, normalize, backend, workspace: as for :func:`fastcl.clip_loss`.

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
            reduction=self.reduction,
            normalize=self.normalize,
            backend=self.backend,
            workspace=self.workspace,
        )
