"""What every loss shares: reductions, normalisation, and the contrast of a positive."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastcl.distributed.meeting import Meeting
from fastcl.distributed.ranks import Ranks
from fastcl.distributed.team import Group
from fastcl.kernels import dispatch
from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.similarity import ops
from fastcl.similarity.inputs import check_choice, check_transforms
from fastcl.similarity.statistics import LogSumExp

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def agree(group: Group | None, embeddings: Tensor, **facts: Any) -> Ranks | None:
    """What the ranks of a group have in common, once all are here; None for one process.

    `facts`: what must be the same on all of them, beside the loss's own arguments.
    """
    if group is None:
        return None
    meeting: Meeting = group  # put there by across_ranks
    return meeting.agree(embeddings, **facts)


def reduce(
    values: Tensor, reduction: Reduction, like: Tensor, ranks: Ranks | None = None
) -> Tensor:
    """Mean, sum, or one value per anchor, in the dtype that losses of `like` have.

    With `ranks` this rank's share: the mean over ranks is that of the whole batch.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if ranks is not None and reduction != "none":
        values = ranks.share(values.sum(), reduction)
    elif reduction == "mean":
        values = values.mean()
    elif reduction == "sum":
        values = values.sum()
    return values.to(accumulation_dtype(like.dtype))


def contrast(positive: Tensor, *negatives: LogSumExp, beside: Tensor | None = None) -> Tensor:
    """-log softmax of the positive among logsumexps of negatives: log(1 + sum e^(lse - positive)).

    Exact however small the loss: nothing is subtracted from the positive's own share. A side
    without negatives adds nothing. `beside`: the same of other negatives, which are added to.
    """
    # 0, and NaN where the positive is infinite, as eager gives. Detached: as gradients, 1 - 1 would
    # swallow the digits of a small one.
    loss = (positive - positive).detach() if beside is None else beside
    for lse in negatives:
        loss = torch.logaddexp(loss, lse.minus(positive))
    return loss


def normalized(x: Tensor, backend: str) -> Tensor:
    """Vectors [..., D] over their L2 norm, computed in float32 or wider, in their own dtype.

    Beside the result only the norms are kept for the gradient, no float32 copy.
    """
    check_transforms(x)
    if x.shape[0] == 0:
        return x  # on one rank of several
    name = dispatch.resolve(backend, x.device)
    y: Tensor = ops.normalize(x.reshape(-1, x.shape[-1]), name)[0]
    return y.reshape(x.shape)
