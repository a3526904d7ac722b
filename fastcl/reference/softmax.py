"""References of the softmax losses: cross-entropy over the whole matrix of logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.reference.distributed import WholeBatch
from fastcl.reference.similarity import accumulation_dtype, diagonal_mask, logits_matrix

Reduction = Literal["mean", "sum", "none"]


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean, sum, or the values as they are."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def normalized(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """Rows divided by their L2 norm, computed in float32 or wider."""
    return tuple(F.normalize(x.to(accumulation_dtype(x)), dim=-1).to(x.dtype) for x in embeddings)


def _cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """-log softmax at the positive [N, 1], as log sum_j e^(l_ij - l_i+).

    The same number as F.cross_entropy; but the positive's gradient comes out as minus the sum of
    the others', where 1 - p loses all digits once p is close to 1.
    """
    return torch.logsumexp(logits - positive, dim=1)


def _cross_entropy_at_diagonal(logits: Tensor, false_negatives: Tensor | None) -> Tensor:
    positive = torch.diagonal(logits)[:, None]
    if false_negatives is not None:
        logits = logits.masked_fill(false_negatives, -torch.inf)
    return _cross_entropy(logits, positive)


def _false_negatives(ids: Tensor | None) -> Tensor | None:
    if ids is None:
        return None
    same = ids[:, None] == ids[None, :]
    return same & ~diagonal_mask(same, 0)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    group: Any | None = None,
    mode: Literal["auto", "gather", "ring"] = "auto",
    reduce_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Reference of :func:`fastcl.clip_loss`."""
    if group is not None:
        batch = WholeBatch(group, image_features)
        image, text = batch.gather(image_features), batch.gather(text_features)
        how: dict[str, Any] = {"ids": batch.ids(ids), "normalize": normalize}
        return batch.share(clip_loss(image, text, logit_scale, reduction="none", **how), reduction)
    if normalize:
        image_features, text_features = normalized(image_features, text_features)
    logits = logits_matrix(image_features, text_features, logit_scale)
    masked = _false_negatives(ids)
    rows = _cross_entropy_at_diagonal(logits, masked)
    cols = _cross_entropy_at_diagonal(logits.T, masked)
    return reduce((rows + cols) / 2, reduction)


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
    group: Any | None = None,
    mode: Literal["auto", "gather", "ring"] = "auto",
    reduce_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Reference of :func:`fastcl.info_nce`."""
    if group is not None:
        batch = WholeBatch(group, query)
        if negative_keys is not None and negative_mode == "paired":
            negative_keys = batch.gather(negative_keys)
        values = info_nce(
            batch.gather(query),
            batch.gather(positive_key),
            negative_keys,
            temperature=temperature,
            negative_mode=negative_mode,
            in_batch=in_batch,
            symmetric=symmetric,
            ids=batch.ids(ids),
            reduction="none",
            normalize=normalize,
        )
        return batch.share(values, reduction)
    if normalize:
        query, positive_key = normalized(query, positive_key)
        if negative_keys is not None:
            (negative_keys,) = normalized(negative_keys)
    scale = 1.0 / temperature
    if symmetric:
        return clip_loss(query, positive_key, scale, ids=ids, reduction=reduction)
    dtype = accumulation_dtype(query)
    positive = (query.to(dtype) * positive_key.to(dtype)).sum(-1, keepdim=True) * scale
    blocks = [positive]
    if negative_keys is None or in_batch:
        logits = logits_matrix(query, positive_key, scale)
        masked = diagonal_mask(logits, 0)
        if ids is not None:
            masked = masked | (ids[:, None] == ids[None, :])
        blocks.append(logits.masked_fill(masked, -torch.inf))
    if negative_keys is not None and negative_mode == "unpaired":
        blocks.append(logits_matrix(query, negative_keys, scale))
    if negative_keys is not None and negative_mode == "paired":
        with torch.autocast(query.device.type, enabled=False):
            paired = torch.einsum("nd,nmd->nm", query.to(dtype), negative_keys.to(dtype))
        blocks.append(paired * scale)
    return reduce(_cross_entropy(torch.cat(blocks, dim=1), positive), reduction)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    group: Any | None = None,
    mode: Literal["auto", "gather", "ring"] = "auto",
    reduce_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Reference of :func:`fastcl.nt_xent`."""
    if group is not None:
        batch = WholeBatch(group, z0)
        how: dict[str, Any] = {"ids": batch.ids(ids), "normalize": normalize}
        values = nt_xent(
            batch.gather(z0), batch.gather(z1), temperature=temperature, reduction="none", **how
        )
        return batch.share(values, reduction, views=2)
    if normalize:
        z0, z1 = normalized(z0, z1)
    n = z0.shape[0]
    z = torch.cat([z0, z1])
    logits = logits_matrix(z, z, 1.0 / temperature)
    masked = diagonal_mask(logits, 0)
    partner = diagonal_mask(logits, n) | diagonal_mask(logits, -n)
    if ids is not None:
        both = torch.cat([ids, ids])
        masked = masked | ((both[:, None] == both[None, :]) & ~partner)
    positive = torch.cat([torch.diagonal(logits, n), torch.diagonal(logits, -n)])[:, None]
    return reduce(_cross_entropy(logits.masked_fill(masked, -torch.inf), positive), reduction)
