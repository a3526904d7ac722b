"""What every loss shares: reductions, normalisation, and the contrast of a positive."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastcl.kernels import dispatch
from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.similarity import ops
from fastcl.similarity.inputs import check_choice, check_transforms
from fastcl.similarity.statistics import LogSumExp

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def reduce(values: Tensor, reduction: Reduction, like: Tensor) -> Tensor:
    """Mean, sum, or one value per anchor, in the dtype that losses of `like` have."""
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "mean":
        values = values.mean()
    elif reduction == "sum":
        values = values.sum()
    return values.to(accumulation_dtype(like.dtype))


def contrast(positive: Tensor, *negatives: LogSumExp) -> Tensor:
    """-log softmax of the positive among logsumexps of negatives: log(1 + sum e^(lse - positive)).

    Exact however small the loss: nothing is subtracted from the positive's own share. A side
    without negatives adds nothing.
    """
    # 0, and NaN where the positive is infinite, as eager gives. Detached: as gradients, 1 - 1 would
    # swallow the digits of a small one.
    loss = (positive - positive).detach()
    for lse in negatives:
        loss = torch.logaddexp(loss, lse.minus(positive))
    return loss


def normalized(x: Tensor, backend: str) -> Tensor:
    """Vectors [..., D] over their L2 norm, computed in float32 or wider, in their own dtype.

    Beside the result only the norms are kept for the gradient, no float32 copy.
    """
    check_transforms(x)
    name = dispatch.resolve(backend, x.device)
    y: Tensor = ops.normalize(x.reshape(-1, x.shape[-1]), name)[0]
    return y.reshape(x.shape)
