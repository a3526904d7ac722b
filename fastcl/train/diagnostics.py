"""Mean similarities of positive and negative pairs, at a cost that grows with N, not N x N.

The mean of <u_i, v_j> over all pairs is <mean of u, mean of v>; pairs that are no negatives are
taken off the sum. Everything stays on the device, in float32, without a host sync.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairSums:
    """Sums over rows, of which both means are made: those of several processes add up."""

    rows: int
    sums: tuple[Tensor, ...]
    formula: Callable[..., tuple[Tensor, Tensor]]

    def means(self) -> tuple[Tensor, Tensor]:
        """The mean similarity of positive pairs, and that of negative pairs."""
        return self.formula(self.rows, *self.sums)

    def packed(self) -> Tensor:
        """All sums as one vector."""
        return torch.cat([each.flatten() for each in self.sums])

    def of(self, rows: int, packed: Tensor) -> PairSums:
        """The same of so many rows, whose sums are `packed`."""
        parts = torch.split(packed, [each.numel() for each in self.sums])
        shaped = zip(parts, self.sums, strict=True)
        return replace(self, rows=rows, sums=tuple(part.view(old.shape) for part, old in shaped))


def _group_sums(x: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    return x.new_zeros(num_ids, x.shape[1]).index_add_(0, ids, x)


def cross_sums(u: Tensor, v: Tensor, ids: Tensor | None = None, num_ids: int = 0) -> PairSums:
    """What `cross_similarities` is made of."""
    u, v = u.detach().float(), v.detach().float()
    sums: tuple[Tensor, ...] = ((u * v).sum(), u.sum(0), v.sum(0))
    if ids is not None:
        ones = u.new_ones(u.shape[0], 1)
        sums += tuple(_group_sums(x, ids, num_ids) for x in (u, v, ones))
    return PairSums(u.shape[0], sums, _cross_means)


def _cross_means(
    n: int, diagonal: Tensor, u: Tensor, v: Tensor, *groups: Tensor
) -> tuple[Tensor, Tensor]:
    excluded: Tensor = diagonal
    count: Tensor | int = n
    if groups:
        of_u, of_v, sizes = groups
        excluded, count = (of_u * of_v).sum(), sizes.square().sum()
    negative = (torch.dot(u, v) - excluded) / (n * n - count)
    return diagonal / n, negative


def cross_similarities(
    u: Tensor, v: Tensor, ids: Tensor | None = None, num_ids: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean of <u_i, v_i>, and mean of <u_i, v_j> over j != i with another id.

    ids: [N] integers in [0, num_ids). Without a single negative pair the second mean is NaN.
    """
    return cross_sums(u, v, ids, num_ids).means()


def two_view_sums(z0: Tensor, z1: Tensor) -> PairSums:
    """What `two_view_similarities` is made of."""
    z0, z1 = z0.detach().float(), z1.detach().float()
    partners = (z0 * z1).sum()
    selves = z0.square().sum() + z1.square().sum()
    return PairSums(z0.shape[0], (partners, selves, z0.sum(0) + z1.sum(0)), _two_view_means)


def _two_view_means(
    n: int, partners: Tensor, selves: Tensor, views: Tensor
) -> tuple[Tensor, Tensor]:
    everything = views.square().sum()
    return partners / n, (everything - selves - 2 * partners) / (2 * n * (2 * n - 2))


def two_view_similarities(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of NT-Xent: among 2N views, all but self and partner are negatives."""
    return two_view_sums(z0, z1).means()
