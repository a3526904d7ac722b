"""InfoNCE: one query, one positive key, and negatives from the batch, a queue, or its own list."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastcl import reference
from fastcl.distributed.meeting import across_ranks
from fastcl.distributed.ranks import Mode, Ranks
from fastcl.distributed.team import Group
from fastcl.functional.clip import clip_loss
from fastcl.functional.common import REDUCTIONS, Reduction, agree, contrast, normalized, reduce
from fastcl.similarity import similarity_weighted_logsumexp
from fastcl.similarity.across import weighted_logsumexp_across
from fastcl.similarity.inputs import (
    check_choice,
    check_device,
    check_dtype,
    check_embeddings,
    check_ids,
    check_paired,
    check_temperature,
    promoted,
)
from fastcl.similarity.statistics import LogSumExp, is_reference, pair_logits, pair_statistics


@across_ranks
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    negative_mode: Literal["unpaired", "paired"] = "unpaired",
    in_batch: bool | None = None,
    symmetric: bool = False,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    group: Group | None = None,
    mode: Mode = "auto",
    reduce_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    r"""InfoNCE of queries against their positive keys and negatives.

    .. math::
        \ell_i = -\log \frac{e^{s_i^+ / \tau}}{e^{s_i^+ / \tau} + \sum_{j \in \mathcal{N}_i}
        e^{s_{ij} / \tau}}, \qquad s_{ij} = \langle \mathrm{query}_i, \mathrm{key}_j \rangle

    Args:
        query, positive_key: [N, D], row i of one belonging to row i of the other; float32,
            bfloat16, float16 or float64. Used as they are: pass unit vectors.
        negative_keys: None: the other rows' positive keys are the negatives (SimCSE, SimCLR's
            one-sided form). [M, D]: negatives of every query (MoCo's queue). [N, M, D] with
            ``negative_mode="paired"``: each query's own (mined hard negatives). With `group`,
            [M, D] must be the same on all ranks: gather what each has of its own with
            :func:`fastcl.distributed.gather_rows`.
        temperature: tau > 0; a float or a tensor with one element, which then gets its gradient.
        negative_mode: "unpaired" or "paired", how `negative_keys` is shaped.
        in_batch: with `negative_keys`, True adds the other rows' positive keys to the negatives;
            None means that they count only where there are no `negative_keys`.
        symmetric: average over both directions (CLIP); not with `negative_keys`.
        ids: integers [N]; rows with equal ids are never each other's in-batch negatives.
        reduction: "mean", "sum", or "none" -> [N].
        normalize: divide all rows by their L2 norm first.
        group: process group or one-dimensional device mesh over whose ranks the batch is spread:
            each passes its own rows. The mean over ranks of the loss and of every gradient is that
            of one process with the whole batch. None: this process alone.
        mode: with `group`, how the other tower travels: "gather" (all of it at once), "ring" (two
            blocks held, transfers behind the computation), or "auto", by size.
        reduce_dtype: with `group`, in which dtype its gradients travel; None: float32, as they are
            summed.
        backend: "auto", "reference", "torch", "cpu" or "triton".
        workspace: bytes that the tiles may take; None means 256 MiB. One direction keeps rows of
            tiles (512 x M numbers) where they fit and saves a product.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or options that do not fit.
        RanksDisagree, RankFailed, RankLost: on every rank of `group`, if one has other arguments,
            raises, or does not come.

    Example:
        >>> import fastcl, torch
        >>> query = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1).requires_grad_()
        >>> key, queue = (torch.nn.functional.normalize(torch.randn(n, 4), dim=-1) for n in (8, 32))
        >>> fastcl.info_nce(query, key, queue, temperature=0.07).backward()

    Source: van den Oord et al. 2018, eq. 4; He et al. 2020 (MoCo), eq. 1.
    """
    query, positive_key = check_embeddings(
        group is not None, query=query, positive_key=positive_key
    )
    check_paired(query=query, positive_key=positive_key)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
    in_batch = negative_keys is None if in_batch is None else in_batch
    _check_options(negative_keys, negative_mode, in_batch, symmetric, ids)
    ids = check_ids("ids", ids, query.shape[0], query)
    if negative_keys is not None:
        query, positive_key, negative_keys = _check_negatives(
            query, positive_key, negative_keys, negative_mode
        )
    scale = check_temperature(temperature, query)
    if symmetric:
        return clip_loss(
            query,
            positive_key,
            scale,
            ids=ids,
            reduction=reduction,
            normalize=normalize,
            group=group,
            mode=mode,
            reduce_dtype=reduce_dtype,
            backend=backend,
            workspace=workspace,
        )
    by_reference = is_reference(backend, query, workspace)
    number = None if negative_keys is None else negative_keys.shape[-2]
    ranks = agree(group, query, number_of_negatives=number, by_reference=by_reference)
    if by_reference:
        return reference.info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=1 / scale,
            negative_mode=negative_mode,
            in_batch=in_batch,
            ids=ids,
            reduction=reduction,
            normalize=normalize,
            group=ranks and ranks.team.group,
        )
    if normalize:
        query, positive_key = normalized(query, backend), normalized(positive_key, backend)
        if negative_keys is not None:
            negative_keys = normalized(negative_keys, backend)
    how: dict[str, Any] = {"scale": scale, "backend": backend, "workspace": workspace}
    in_batch_how = {**how, "row_ids": ids, "col_ids": ids, "positives": 0} if in_batch else None
    if negative_keys is not None and len(query) == 0:  # on one rank of several
        values = _values(query, positive_key, None, in_batch_how, ranks, how)
        # The keys may come from all ranks, who wait for their gradient: of zeros.
        return reduce(values, reduction, query, ranks) + negative_keys[:0].sum()
    if reduction != "none":
        # Row weights are known up front: one stream where there is one, its gradient made at once.
        divisor = len(query) if reduction == "mean" and ranks is None else 1
        loss = None
        if negative_keys is None and ranks is None:
            assert in_batch_how is not None
            return similarity_weighted_logsumexp(
                query, positive_key, **in_batch_how, divisor=divisor
            )
        if negative_keys is None and ranks is not None and ranks.mode == "gather":
            loss = weighted_logsumexp_across(query, positive_key, ranks, ids=ids, **how)
        elif negative_keys is not None and not in_batch and negative_mode == "unpaired":
            loss = _against_list(query, positive_key, negative_keys, divisor=divisor, **how)
        if loss is not None:
            return loss if ranks is None else ranks.share(loss, reduction)
    values = _values(query, positive_key, negative_keys, in_batch_how, ranks, how)
    return reduce(values, reduction, query, ranks)


def _values(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    in_batch: dict[str, Any] | None,
    ranks: Ranks | None,
    how: dict[str, Any],
) -> Tensor:
    """Each query's loss. `in_batch`: the options of in-batch negatives, where they count."""
    exact = in_batch is None or query.dtype == torch.float32
    positive = pair_logits(query, positive_key, how["scale"]) if exact else None
    beside = None
    if in_batch is not None:
        rows, _, tile_positive = pair_statistics(query, positive_key, **in_batch, ranks=ranks)
        if negative_keys is None:
            return contrast(tile_positive, rows)
        # Negatives of tiles stand beside the positive of their own tile, whose rounding they share;
        # a query's own, which are float64 dot products, beside one of their kind. (Float64's tiles
        # are of that kind, too; 16-bit gradients in two parts would be rounded twice.)
        if positive is not None and negative_keys.dim() == 3:
            beside = contrast(tile_positive, rows)
        else:
            positive = tile_positive
    assert positive is not None
    if negative_keys is None:
        return positive  # of no query: a rank of several without rows
    if negative_keys.dim() == 3:
        others = LogSumExp.of(pair_logits(query, negative_keys, how["scale"]))
    else:
        others = pair_statistics(query, negative_keys, **how).rows
    if in_batch is not None and beside is None:
        return contrast(positive, rows, others)
    return contrast(positive, others, beside=beside)


def _against_list(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor, *, scale: Tensor, **how: Any
) -> Tensor:
    """Sum over queries of the loss against one list of negatives."""
    positive = pair_logits(query, positive_key, scale)
    # 0, and NaN where the positive is infinite, as eager gives: a bias of -inf drops the row.
    zero = (positive - positive).detach()
    how |= {"row_bias": zero - positive, "add_zero": True}
    return similarity_weighted_logsumexp(query, negative_keys, scale=scale, **how)


def _check_options(
    negative_keys: Tensor | None, mode: str, in_batch: bool, symmetric: bool, ids: Tensor | None
) -> None:
    if negative_keys is None and mode == "paired":
        raise ValueError(
            'negative_mode="paired" has no meaning without negative_keys [N, M, D], each query\'s '
            'own: pass them, or leave negative_mode at "unpaired"'
        )
    if negative_keys is None and not in_batch:
        raise ValueError(
            "in_batch=False without negative_keys leaves no negatives: pass negative_keys, or "
            "leave in_batch at None"
        )
    if symmetric and negative_keys is not None:
        raise ValueError(
            "symmetric=True has no meaning with negative_keys, which have no second direction: "
            "drop one of the two"
        )
    if ids is not None and not in_batch:
        raise ValueError(
            "ids mark in-batch false negatives, and in-batch negatives are off here: pass "
            "in_batch=True, or drop ids"
        )


def _check_negatives(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor, mode: str
) -> list[Tensor]:
    """Negatives of the shape that their mode asks for, and all three in one dtype."""
    if not isinstance(negative_keys, Tensor):
        raise TypeError(f"negative_keys must be a tensor, not {type(negative_keys).__name__}")
    if mode == "unpaired":
        if negative_keys.dim() == 3:
            raise ValueError(
                f"negative_keys has shape {list(negative_keys.shape)}; expected [M, D]. Pass "
                'negative_mode="paired" for [N, M, D], each query its own negatives'
            )
        query, positive_key = check_embeddings(True, query=query, positive_key=positive_key)
        if negative_keys.shape[0] == 0:
            check_embeddings(negative_keys=negative_keys)
        return check_embeddings(
            True, query=query, positive_key=positive_key, negative_keys=negative_keys
        )
    n, d = query.shape
    if negative_keys.dim() != 3 or negative_keys.shape[0] != n or negative_keys.shape[2] != d:
        raise ValueError(
            f"negative_keys has shape {list(negative_keys.shape)}; expected [{n}, M, {d}] with "
            'negative_mode="paired"'
        )
    if negative_keys.shape[1] == 0:
        raise ValueError("negative_keys has no negatives (M = 0); pass None for in-batch negatives")
    check_dtype("negative_keys", negative_keys)
    check_device(query=query, negative_keys=negative_keys)
    return promoted(query, positive_key, negative_keys)
