"""NT-Xent: two views of each sample, every other embedding a negative (SimCLR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import reference
from fastcl.distributed.meeting import across_ranks
from fastcl.distributed.ranks import Mode
from fastcl.distributed.team import Group
from fastcl.functional.common import REDUCTIONS, Reduction, agree, contrast, normalized, reduce
from fastcl.similarity.inputs import (
    check_choice,
    check_embeddings,
    check_ids,
    check_paired,
    check_temperature,
)
from fastcl.similarity.statistics import is_reference, pair_statistics


@across_ranks
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    group: Group | None = None,
    mode: Mode = "auto",
    reduce_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    r"""Normalised-temperature cross-entropy over the 2N views of N samples (SimCLR).

    .. math::
        \ell_i = -\log \frac{e^{s_{i,i^+} / \tau}}{\sum_{j \neq i} e^{s_{ij} / \tau}}, \qquad
        i = 1 \dots 2N, \quad s_{ij} = \langle z_i, z_j \rangle

    where i+ is the other view of i. The matrix of 2N x 2N similarities is symmetric, and only half
    of its tiles are made. The two views are copied into one tensor.

    Args:
        z0, z1: [N, D], the two views of each sample; float32, bfloat16, float16 or float64. Used
            as they are: pass unit vectors, or `normalize=True`.
        temperature: tau > 0; a float or a tensor with one element, which then gets its gradient.
        ids: integers [N]; samples with equal ids are never each other's negatives.
        reduction: "mean", "sum", or "none" -> [2N], the anchors of z0 and then those of z1.
        normalize: divide the rows by their L2 norm first.
        group: process group or one-dimensional device mesh over whose ranks the batch is spread:
            each passes its own rows. The mean over ranks of the loss and of every gradient is that
            of one process with the whole batch. None: this process alone.
        mode: with `group`, how the other tower travels: "gather" (all of it at once), "ring" (two
            blocks held, transfers behind the computation), or "auto", by size.
        reduce_dtype: with `group`, in which dtype its gradients travel; None: float32, as they are
            summed.
        backend: "auto", "reference", "torch", "cpu" or "triton".
        workspace: bytes that the tiles may take; None means 256 MiB, of which some 8 MiB are used.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or options that do not fit.
        RanksDisagree, RankFailed, RankLost: on every rank of `group`, if one has other arguments,
            raises, or does not come.

    Example:
        >>> import fastcl, torch
        >>> z0 = torch.randn(8, 4, requires_grad=True)
        >>> z1 = torch.randn(8, 4, requires_grad=True)
        >>> fastcl.nt_xent(z0, z1, temperature=0.5, normalize=True).backward()

    Source: Chen et al. 2020 (SimCLR), eq. 1.
    """
    z0, z1 = check_embeddings(group is not None, z0=z0, z1=z1)
    check_paired(z0=z0, z1=z1)
    check_choice("reduction", reduction, REDUCTIONS)
    scale = check_temperature(temperature, z0)
    ids = check_ids("ids", ids, z0.shape[0], z0)
    by_reference = is_reference(backend, z0, workspace)
    ranks = agree(group, z0, by_reference=by_reference)
    if by_reference:
        return reference.nt_xent(
            z0,
            z1,
            temperature=1 / scale,
            ids=ids,
            reduction=reduction,
            normalize=normalize,
            group=ranks and ranks.team.group,
        )
    if normalize:
        z0, z1 = normalized(z0, backend), normalized(z1, backend)
    how: dict[str, Any] = {"scale": scale, "backend": backend, "workspace": workspace}
    one_frozen = torch.is_grad_enabled() and z0.requires_grad != z1.requires_grad
    if one_frozen and ranks is None:
        return reduce(_by_views(z0, z1, ids, how), reduction, z0)
    z = torch.cat([z0, z1])
    samples = torch.arange(len(z0), device=z.device) if ids is None else ids
    both = torch.cat([samples, samples])  # drops each view itself and, both ways, its partner
    if ranks is not None:
        ranks = ranks.times(2)
        how |= {"ranks": ranks, "local_ids": ids is None}
    within, _, positive = pair_statistics(
        z, None, row_ids=both, col_ids=both, positives=len(z0), mirrored=True, **how
    )
    # (Across ranks positives come back one per row, as many as there are columns.)
    positive = positive[: len(z0)]
    return reduce(contrast(torch.cat([positive, positive]), within), reduction, z, ranks)


def _by_views(z0: Tensor, z1: Tensor, ids: Tensor | None, how: dict[str, Any]) -> Tensor:
    """In three streams, two within a view and one between them: none for a view that is frozen."""
    how = how | {"row_ids": ids, "col_ids": ids, "positives": 0}
    within0, within1 = (pair_statistics(z, None, **how).rows for z in (z0, z1))
    rows, cols, positive = pair_statistics(z0, z1, dim="both", **how)
    return torch.cat([contrast(positive, within0, rows), contrast(positive, within1, cols)])
