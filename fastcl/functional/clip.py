"""The symmetric loss of two towers: CLIP."""

from __future__ import annotations

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
    check_number,
    check_paired,
)
from fastcl.similarity.statistics import is_reference, pair_statistics


@across_ranks
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
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
    r"""Symmetric InfoNCE between two towers, as CLIP, ALIGN and LiT use it.

    .. math::
        \ell_i = \tfrac12 \Bigl[\log \sum_j e^{l_{ij}} + \log \sum_j e^{l_{ji}}\Bigr] - l_{ii},
        \qquad l_{ij} = t\,\langle \mathrm{image}_i, \mathrm{text}_j \rangle

    Row and column statistics come from the same tiles; the N x N matrix is never stored.

    Args:
        image_features, text_features: [N, D], row i of one belonging to row i of the other;
            float32, bfloat16, float16 or float64. Used as they are: pass unit vectors.
        logit_scale: t = 1 / temperature, already exponentiated; a float or a tensor with one
            element, which then gets its gradient. CLIP starts at 1 / 0.07 and clamps at 100.
        ids: integers [N]; rows with equal ids are never each other's negatives.
        reduction: "mean", "sum", or "none" -> [N], the mean of an index's two directions.
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
        >>> fastcl.clip_loss(image, text, logit_scale=14.3).backward()

    Source: Radford et al. 2021, figure 3.
    """
    spread = group is not None
    image, text = check_embeddings(
        spread, image_features=image_features, text_features=text_features
    )
    check_paired(image_features=image, text_features=text)
    check_choice("reduction", reduction, REDUCTIONS)
    scale = check_number("logit_scale", logit_scale, image)
    ids = check_ids("ids", ids, image.shape[0], image)
    by_reference = is_reference(backend, image, workspace)
    ranks = agree(group, image, by_reference=by_reference)
    if by_reference:
        return reference.clip_loss(
            image,
            text,
            scale,
            ids=ids,
            reduction=reduction,
            normalize=normalize,
            group=ranks and ranks.team.group,
        )
    if normalize:
        image, text = normalized(image, backend), normalized(text, backend)
    rows, cols, positive = pair_statistics(
        image,
        text,
        scale=scale,
        row_ids=ids,
        col_ids=ids,
        positives=0,
        dim="both",
        backend=backend,
        workspace=workspace,
        ranks=ranks,
    )
    values = (contrast(positive, rows) + contrast(positive, cols)) / 2
    return reduce(values, reduction, image, ranks)
