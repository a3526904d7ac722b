"""The sigmoid losses as modules."""

from __future__ import annotations

from torch import Tensor

from fastcl import functional
from fastcl.losses.common import Loss


class SigLipLoss(Loss):
    """SigLIP's pairwise sigmoid loss as a module; see :func:`fastcl.siglip_loss`.

    Scale and bias are the model's parameters and are passed to each call; the scale already
    exponentiated.

    Args:
        reduction, normalize, group, mode, reduce_dtype, backend, workspace: as for
            :func:`fastcl.siglip_loss`.

    Example:
        >>> import fastcl, torch
        >>> loss = fastcl.losses.SigLipLoss(normalize=True)
        >>> loss(torch.randn(8, 4, requires_grad=True), torch.randn(8, 4), 10.0, -10.0).backward()

    Source: Zhai et al. 2023, section 3.2, eq. 1.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of paired features [N, D]."""
        return functional.siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            ids=ids,
            **self.options,
        )
