"""The pairwise sigmoid loss: SigLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import reference
from fastcl.distributed.meeting import across_ranks
from fastcl.distributed.ranks import Mode
from fastcl.distributed.team import Group
from fastcl.functional.common import REDUCTIONS, Reduction, agree, normalized
from fastcl.similarity import similarity_sigmoid
from fastcl.similarity.across import sigmoid_across
from fastcl.similarity.inputs import (
    check_choice,
    check_embeddings,
    check_ids,
    check_number,
    check_paired,
)
from fastcl.similarity.statistics import is_reference


@across_ranks
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    group: Group | None = None,
    mode: Mode = "auto",
    reduce_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    r"""Sigmoid loss of all pairs of two towers, as SigLIP uses it.

    .. math::
        L = -\frac1N \sum_{ij} \log \sigma(y_{ij} l_{ij}), \qquad
        l_{ij} = t\,\langle \mathrm{image}_i, \mathrm{text}_j \rangle + b

    with y = +1 on the diagonal and -1 elsewhere. Divided by N, not N^2. Loss and gradients come
    from one pass over the tiles of the matrix, which is never stored.

    Args:
        image_features, text_features: [N, D], row i of one belonging to row i of the other;
            float32, bfloat16, float16 or float64. Used as they are: pass unit vectors.
        logit_scale: t, already exponentiated; a float or a tensor with one element, which then
            gets its gradient. SigLIP starts at 10.
        logit_bias: b, likewise. SigLIP starts at -10.
        ids: integers [N]; pairs of different rows with equal ids are left out.
        reduction: "mean", "sum", or "none" -> [N], each image's sum over all texts.
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
        >>> image = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1).requires_grad_()
        >>> text = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1).requires_grad_()
        >>> fastcl.siglip_loss(image, text, logit_scale=10.0, logit_bias=-10.0).backward()

    Source: Zhai et al. 2023, section 3.2, eq. 1.
    """
    spread = group is not None
    image, text = check_embeddings(
        spread, image_features=image_features, text_features=text_features
    )
    check_paired(image_features=image, text_features=text)
    check_choice("reduction", reduction, REDUCTIONS)
    scale = check_number("logit_scale", logit_scale, image)
    bias = check_number("logit_bias", logit_bias, image)
    ids = check_ids("ids", ids, image.shape[0], image)
    by_reference = is_reference(backend, image, workspace)
    ranks = agree(group, image, by_reference=by_reference)
    if by_reference:
        return reference.siglip_loss(
            image,
            text,
            scale,
            bias,
            ids=ids,
            reduction=reduction,
            normalize=normalize,
            group=ranks and ranks.team.group,
        )
    if normalize:
        image, text = normalized(image, backend), normalized(text, backend)
    if ranks is not None:
        how: dict[str, Any] = {"ids": ids, "backend": backend, "workspace": workspace}
        by_row = reduction == "none"
        loss = sigmoid_across(image, text, ranks, scale=scale, bias=bias, by_row=by_row, **how)
        return loss if by_row else ranks.share(loss, reduction)
    how = {"row_ids": ids, "col_ids": ids, "backend": backend}
    how |= {"reduction": "rows" if reduction == "none" else "sum", "workspace": workspace}
    how["divisor"] = image.shape[0] if reduction == "mean" else 1
    return similarity_sigmoid(image, text, scale=scale, bias=bias, **how)
