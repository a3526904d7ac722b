"""Stand-ins for ``open_clip.loss``: change the import, keep the training loop.

Names, argument names and returns are open_clip's. With several processes the gradient that reaches
each parameter after DDP's mean is that of one process with the whole batch, in every setting.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl import functional
from fastcl.distributed import sum_over_ranks
from fastcl.distributed.meeting import Meeting
from fastcl.distributed.ranks import Mode
from fastcl.losses.common import Loss

# dist_impl of SigLipLoss, and what does the same here.
_DIST_IMPLS = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}

# What open_clip's gradients are without gather_with_grad, by local_loss.
_WITHOUT_GRAD = {
    False: "the features' gradients would be 1/{world_size} of the exact ones, the scale's whole",
    True: "the features' gradients would lack what other ranks' losses add, and point elsewhere",
}
_said: set[str] = set()


class _OpenClipLoss(Loss):
    """What both stand-ins accept beside the options of :class:`fastcl.losses.common.Loss`."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank={rank}, world_size={world_size}; expected 0 <= rank < world_size, as "
                "torch.distributed.get_rank() and get_world_size() give them"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self._checked = False
        self.world_size = world_size

    def call_options(self) -> dict[str, Any]:
        """The options of a call: where there are several processes, all of them are the group."""
        return {**self.options, "group": self._world() if self.world_size > 1 else None}

    def _world(self) -> Any:
        if not self._checked:  # once: on all ranks, or one that is told another rank leaves alone
            self._check_world()
            self._checked = True
        return dist.group.WORLD

    def _check_world(self) -> None:
        given = self.rank, self.world_size
        if not dist.is_initialized():
            raise RuntimeError(
                f"rank={given[0]}, world_size={given[1]}, but torch.distributed is not "
                "initialized: call torch.distributed.init_process_group() first"
            )
        found = dist.get_rank(), dist.get_world_size()
        with Meeting(dist.group.WORLD, type(self).__name__) as meeting:
            if found != given:
                raise ValueError(
                    f"rank={given[0]}, world_size={given[1]}, but torch.distributed says "
                    f"rank={found[0]}, world_size={found[1]}: pass these"
                )
            meeting.agree_on_rows(0)

    def extra_repr(self) -> str:
        """The rank, where there are several, and the options that differ from their defaults."""
        rank = f"rank={self.rank}, world_size={self.world_size}" if self.world_size > 1 else ""
        return ", ".join(filter(None, (rank, super().extra_repr())))


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, UserWarning, stacklevel=4)


def _output(loss: Tensor, output_dict: bool) -> Tensor | dict[str, Tensor]:
    return {"contrastive_loss": loss} if output_dict else loss


class ClipLoss(_OpenClipLoss):
    """``open_clip.loss.ClipLoss`` without the N x N matrix; see :func:`fastcl.clip_loss`.

    Args:
        local_loss: with several processes, False returns the loss of the whole batch on each of
            them, True each one's share, whose mean that is. The gradients are the same.
        gather_with_grad: accepted: gradients are always exact, as open_clip's are with True. False
            is answered by a warning, once, that says what open_clip's would have been.
        rank, world_size: as torch.distributed gives them.
        cache_labels: accepted; there are no labels to cache.
        mode, reduce_dtype, backend, workspace: as for :func:`fastcl.clip_loss`.

    Raises:
        ValueError: for a rank and world size that there are not.

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
        mode: Mode = "auto",
        reduce_dtype: torch.dtype | None = None,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        super().__init__(
            cache_labels,
            rank,
            world_size,
            mode=mode,
            reduce_dtype=reduce_dtype,
            backend=backend,
            workspace=workspace,
        )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        if world_size > 1 and rank == 0 and not gather_with_grad:
            theirs = _WITHOUT_GRAD[bool(local_loss)].format(world_size=world_size)
            _say_once(
                f"fastcl's ClipLoss gives the exact gradient. With open_clip's own, and as here "
                f"local_loss={bool(local_loss)}, gather_with_grad=False, {theirs}. Learning rates "
                "that were tuned with it may not fit"
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-dim, or ``{"contrastive_loss": loss}``; logit_scale already exponentiated."""
        options = self.call_options()
        loss = functional.clip_loss(image_features, text_features, logit_scale, **options)
        if options["group"] is not None and not self.local_loss:
            whole = sum_over_ranks(loss, options["group"]) / self.world_size
            loss = loss + (whole - loss).detach()  # its value; the gradient stays this rank's
        if logit_bias is not None:
            # A bias shared by all logits leaves a softmax as it is: its gradient is exactly 0, but
            # it must be in the graph, or DDP waits for a gradient that never comes.
            loss = loss + 0.0 * logit_bias.sum()
        return _output(loss, output_dict)


class SigLipLoss(_OpenClipLoss):
    """``open_clip.loss.SigLipLoss`` without the N x N matrix; see :func:`fastcl.siglip_loss`.

    Args:
        cache_labels, chunk_size: accepted; there is nothing to cache or to chunk.
        rank, world_size: as torch.distributed gives them.
        dist_impl: None, "bidir" or "shift": texts go round a ring; "reduce" or "gather": all of
            them at once. The loss and its gradients are the same.
        reduce_dtype, backend, workspace: as for :func:`fastcl.siglip_loss`.

    Raises:
        ValueError: for an unknown `dist_impl`, or a rank and world size that there are not.

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
        reduce_dtype: torch.dtype | None = None,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        if dist_impl is not None and dist_impl not in _DIST_IMPLS:
            raise ValueError(
                f"dist_impl={dist_impl!r} is not known; choose one of {', '.join(_DIST_IMPLS)}"
            )
        self.dist_impl = dist_impl or "bidir"
        super().__init__(
            cache_labels,
            rank,
            world_size,
            mode=_DIST_IMPLS[self.dist_impl] if world_size > 1 else "auto",
            reduce_dtype=reduce_dtype,
            backend=backend,
            workspace=workspace,
        )
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
            image_features, text_features, logit_scale, logit_bias, **self.call_options()
        )
        return _output(loss, output_dict)
