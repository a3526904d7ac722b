"""NT-Xent: two views of each sample, every other embedding a negative (SimCLR)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl import reference
from fastcl.functional.common import REDUCTIONS, Reduction, contrast, normalized, reduce
from fastcl.similarity.inputs import (
    check_choice,
    check_embeddings,
    check_ids,
    check_paired,
    check_temperature,
)
from fastcl.similarity.primitives import is_reference, pair_statistics


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
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
        backend: "auto", "reference", "torch" or "cpu".
        workspace: bytes that the tiles may take; None means 256 MiB, of which some 8 MiB are used.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or options that do not fit.

    Example:
        >>> import fastcl, torch
        >>> z0 = torch.randn(8, 4, requires_grad=True)
        >>> z1 = torch.randn(8, 4, requires_grad=True)
        >>> fastcl.nt_xent(z0, z1, temperature=0.5, normalize=True).backward()

    Source: Chen et al. 2020 (SimCLR), eq. 1.
    """
    z0, z1 = check_embeddings(z0=z0, z1=z1)
    check_paired(z0=z0, z1=z1)
    check_choice("reduction", reduction, REDUCTIONS)
    scale = check_temperature(temperature, z0)
    ids = check_ids("ids", ids, z0.shape[0], z0)
    if normalize:
        z0, z1 = normalized(z0), normalized(z1)
    if is_reference(backend, z0):
        return reference.nt_xent(z0, z1, temperature=1 / scale, ids=ids, reduction=reduction)
    n = z0.shape[0]
    z = torch.cat([z0, z1])
    samples = torch.arange(n, device=z.device) if ids is None else ids
    both = torch.cat([samples, samples])  # drops each view itself and, both ways, its partner
    within, _, positive = pair_statistics(
        z,
        None,
        scale=scale,
        row_ids=both,
        col_ids=both,
        positives=n,
        mirrored=True,
        backend=backend,
        workspace=workspace,
    )
    return reduce(contrast(torch.cat([positive, positive]), within), reduction, z)
