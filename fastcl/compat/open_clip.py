"""Stand-ins for ``open_clip.loss``: change the import, keep the training loop.

Names, argument names and returns are open_clip's. These serve one process: ``world_size`` above 1
is refused, as a local loss there would silently be another loss.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcl import functional
from fastcl.losses.common import Loss

_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class _OneProcess(Loss):
    """What both stand-ins accept beside the options of :class:`fastcl.losses.common.Loss`."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int, **options: Any) -> None:
        super().__init__(**options)
        if world_size != 1 or rank != 0:
            raise NotImplementedError(
                f"rank={rank}, world_size={world_size}: fastcl's open_clip losses work in one "
                "process in this version; expected rank=0, world_size=1. Keep open_clip's own loss "
                "for several processes"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size


def _output(loss: Tensor, output_dict: bool) -> Tensor | dict[str, Tensor]:
    return {"contrastive_loss": loss} if output_dict else loss


class ClipLoss(_OneProcess):
    """``open_clip.loss.ClipLoss`` without the N x N matrix; see :func:`fastcl.clip_loss`.

    Args:
        local_loss, gather_with_grad, rank, world_size: accepted; only one process is served.
        cache_labels: accepted; there are no labels to cache.
        backend, workspace: as for :func:`fastcl.clip_loss`.

    Raises:
        NotImplementedError: for more than one process.

    Example:
        >>> import torch
        >>> from fastcl.compat.open_clip import ClipLoss
        >>> image = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1).requires_grad_()
        >>> text = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
        >>> out = ClipLoss()(image, text, torch.tensor(14.3), output_dict=True)
        >>> out["contrastive_loss"].backward()

    Source: open_clip's ``loss.py``; Radford et al. 2021, figure 3.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, backend=backend, workspace=workspace)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-dim, or ``{"contrastive_loss": loss}``; logit_scale already exponentiated."""
        loss = functional.clip_loss(image_features, text_features, logit_scale, **self.options)
        if logit_bias is not None:
            # A bias shared by all logits leaves a softmax as it is: its gradient is exactly 0, but
            # it must be in the graph, or DDP waits for a gradient that never comes.
            loss = loss + 0.0 * logit_bias.sum()
        return _output(loss, output_dict)


class SigLipLoss(_OneProcess):
    """``open_clip.loss.SigLipLoss`` without the N x N matrix; see :func:`fastcl.siglip_loss`.

    Args:
        cache_labels, chunk_size: accepted; there is nothing to cache or to chunk.
        rank, world_size: only one process is served.
        dist_impl: None, "bidir", "shift", "reduce" or "gather"; of no effect in one process.
        backend, workspace: as for :func:`fastcl.siglip_loss`.

    Raises:
        NotImplementedError: for more than one process.
        ValueError: for an unknown `dist_impl`.

    Example:
        >>> import torch
        >>> from fastcl.compat.open_clip import SigLipLoss
        >>> image = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1).requires_grad_()
        >>> text = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
        >>> SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0)).backward()

    Source: open_clip's ``loss.py``; Zhai et al. 2023, eq. 1.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, backend=backend, workspace=workspace)
        if dist_impl is not None and dist_impl not in _DIST_IMPLS:
            raise ValueError(
                f"dist_impl={dist_impl!r} is not known; choose one of {', '.join(_DIST_IMPLS)}"
            )
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-dim, or ``{"contrastive_loss": loss}``; logit_scale already exponentiated."""
        loss = functional.siglip_loss(
            image_features, text_features, logit_scale, logit_bias, **self.options
        )
        return _output(loss, output_dict)
