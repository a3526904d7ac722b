"""Mean similarities of positive and negative pairs, at a cost that grows with N, not N x N.

The mean of <u_i, v_j> over all pairs is <mean of u, mean of v>; pairs that are no negatives are
taken off the sum. Everything stays on the device, in float32, without a host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _group_sums(x: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    return x.new_zeros(num_ids, x.shape[1]).index_add_(0, ids, x)


def cross_similarities(
    u: Tensor, v: Tensor, ids: Tensor | None = None, num_ids: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean of <u_i, v_i>, and mean of <u_i, v_j> over j != i with another id.

    ids: [N] integers in [0, num_ids). Without a single negative pair the second mean is NaN.
    """
    u, v = u.detach().float(), v.detach().float()
    n = u.shape[0]
    diagonal = (u * v).sum()
    excluded: Tensor = diagonal
    count: Tensor | int = n
    if ids is not None:
        excluded = (_group_sums(u, ids, num_ids) * _group_sums(v, ids, num_ids)).sum()
        count = _group_sums(u.new_ones(n, 1), ids, num_ids).square().sum()
    negative = (torch.dot(u.sum(0), v.sum(0)) - excluded) / (n * n - count)
    return diagonal / n, negative


def two_view_similarities(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of NT-Xent: among 2N views, all but self and partner are negatives."""
    z0, z1 = z0.detach().float(), z1.detach().float()
    n = z0.shape[0]
    partners = (z0 * z1).sum()
    selves = z0.square().sum() + z1.square().sum()
    everything = (z0.sum(0) + z1.sum(0)).square().sum()
    return partners / n, (everything - selves - 2 * partners) / (2 * n * (2 * n - 2))
