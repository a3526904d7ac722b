"""The losses and primitives in eager PyTorch, as people write them: what ours are measured against.

They take the arguments of fastcl's functions and work in the dtype of what they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _labels(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[0])


def _eye(logits: Tensor, offset: int = 0) -> Tensor:
    rows, cols = (torch.arange(n) for n in logits.shape)
    return cols[None, :] == rows[:, None] + offset


def _without_false_negatives(logits: Tensor, ids: Tensor | None) -> Tensor:
    if ids is None:
        return logits
    return logits.masked_fill((ids[:, None] == ids[None, :]) & ~_eye(logits), -torch.inf)


def normalizing(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss with an option `normalize`, as people normalise: in the dtype at hand."""

    @functools.wraps(loss)
    def wrapped(*embeddings: Tensor, normalize: bool = False, **given: Any) -> Tensor:
        if normalize:
            vectors = {k: x for k, x in given.items() if isinstance(x, Tensor) and x.dim() > 1}
            given |= {name: F.normalize(x, dim=-1) for name, x in vectors.items()}
        return loss(*embeddings, **given)

    return wrapped


@normalizing
def clip_loss(image_features, text_features, logit_scale, *, ids=None, reduction="mean"):
    """open_clip's ClipLoss in one process."""
    per_image = logit_scale * image_features @ text_features.T
    per_text = logit_scale * text_features @ image_features.T
    losses = [
        F.cross_entropy(_without_false_negatives(x, ids), _labels(x), reduction=reduction)
        for x in (per_image, per_text)
    ]
    return (losses[0] + losses[1]) / 2


@normalizing
def siglip_loss(
    image_features, text_features, logit_scale, logit_bias, *, ids=None, reduction="mean"
):
    """open_clip's SigLipLoss in one process."""
    logits = logit_scale * image_features @ text_features.T
    logits = logits + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - torch.ones_like(logits)
    loss = -F.logsigmoid(signs * logits)
    if ids is not None:
        loss = loss.masked_fill((ids[:, None] == ids[None, :]) & ~_eye(logits), 0.0)
    if reduction == "none":
        return loss.sum(dim=1)
    return loss.sum() / (len(logits) if reduction == "mean" else 1)


@normalizing
def info_nce(
    query,
    positive_key,
    negative_keys=None,
    *,
    temperature=0.1,
    negative_mode="unpaired",
    in_batch=None,
    symmetric=False,
    ids=None,
    reduction="mean",
):
    """The common InfoNCE gist: cross-entropy of logits / temperature."""
    if symmetric:
        per_query = query @ positive_key.T / temperature
        losses = [
            F.cross_entropy(_without_false_negatives(x, ids), _labels(x), reduction=reduction)
            for x in (per_query, per_query.T)
        ]
        return (losses[0] + losses[1]) / 2
    if negative_keys is None:
        logits = _without_false_negatives(query @ positive_key.T / temperature, ids)
        return F.cross_entropy(logits, _labels(logits), reduction=reduction)
    if negative_mode == "paired":
        negatives = (query.unsqueeze(1) @ negative_keys.transpose(1, 2)).squeeze(1)
    else:
        negatives = query @ negative_keys.T
    if in_batch:
        logits = torch.cat([query @ positive_key.T, negatives], dim=1) / temperature
        if ids is not None:
            same = (ids[:, None] == ids[None, :]) & ~torch.eye(len(ids), dtype=torch.bool)
            logits = logits.masked_fill(F.pad(same, (0, negatives.shape[1])), -torch.inf)
        return F.cross_entropy(logits, _labels(logits), reduction=reduction)
    positive = torch.sum(query * positive_key, dim=1, keepdim=True)
    logits = torch.cat([positive, negatives], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(_labels(logits)), reduction=reduction)


@normalizing
def nt_xent(z0, z1, *, temperature=0.5, ids=None, reduction="mean"):
    """SimCLR's loss on the concatenated views."""
    z = torch.cat([z0, z1])
    logits = z @ z.T / temperature
    logits = logits.masked_fill(_eye(logits), -torch.inf)
    labels = _labels(logits).roll(len(z0))
    if ids is not None:
        both = torch.cat([ids, ids])
        partner = _labels(logits)[None, :] == labels[:, None]
        logits = logits.masked_fill((both[:, None] == both[None, :]) & ~partner, -torch.inf)
    return F.cross_entropy(logits, labels, reduction=reduction)


def _logits(u, v, scale, row_bias=None, col_bias=None, diag_bias=None) -> Tensor:
    scale = scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale
    logits = scale * u @ v.T
    if row_bias is not None:
        logits = logits + row_bias[:, None]
    if col_bias is not None:
        logits = logits + col_bias
    if diag_bias is not None:
        padded = F.pad(torch.diag(diag_bias), (0, logits.shape[1] - len(diag_bias)))
        logits = logits + F.pad(padded, (0, 0, 0, logits.shape[0] - len(diag_bias)))
    return logits


def similarity_logsumexp(
    u,
    v=None,
    *,
    scale=1.0,
    row_bias=None,
    col_bias=None,
    diag_bias=None,
    mask_diagonal=None,
    row_ids=None,
    col_ids=None,
    dim="rows",
):
    """The matrix, -inf where a pair is dropped, and torch.logsumexp."""
    if v is None:
        v, col_ids = u, row_ids if col_ids is None else col_ids
    logits = _logits(u, v, scale, row_bias, col_bias, diag_bias)
    if mask_diagonal is not None:
        logits = logits.masked_fill(_eye(logits, mask_diagonal), -torch.inf)
    if row_ids is not None:
        logits = logits.masked_fill(row_ids[:, None] == col_ids[None, :], -torch.inf)
    both = torch.logsumexp(logits, dim=1), torch.logsumexp(logits, dim=0)
    return both if dim == "both" else both[dim == "cols"]


def similarity_weighted_logsumexp(
    u,
    v,
    weights=None,
    *,
    scale=1.0,
    row_bias=None,
    col_bias=None,
    row_ids=None,
    col_ids=None,
    positives=None,
    add_zero=False,
):
    """Cross-entropy at the positives, or a logsumexp (with a column of zeros), summed."""
    logits = _logits(u, v, scale, row_bias, col_bias)
    if row_ids is not None:
        dropped = row_ids[:, None] == col_ids[None, :]
        if positives is not None:
            dropped = dropped & ~_eye(logits, positives)
        logits = logits.masked_fill(dropped, -torch.inf)
    if positives is not None:
        values = F.cross_entropy(logits, _labels(logits) + positives, reduction="none")
    else:
        if add_zero:
            logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)
        values = torch.logsumexp(logits, dim=1)
    return values.sum() if weights is None else (values * weights).sum()


def similarity_sigmoid(
    u,
    v,
    *,
    scale,
    bias,
    row_bias=None,
    col_bias=None,
    positives=0,
    row_ids=None,
    col_ids=None,
    reduction="sum",
):
    """-log sigmoid of signed logits, summed."""
    logits = _logits(u, v, scale, row_bias, col_bias) + bias
    signs = -torch.ones_like(logits)
    if positives is not None:
        signs = signs.masked_fill(_eye(logits, positives), 1.0)
    loss = -F.logsigmoid(signs * logits)
    if row_ids is not None:
        dropped = row_ids[:, None] == col_ids[None, :]
        if positives is not None:
            dropped = dropped & ~_eye(logits, positives)
        loss = loss.masked_fill(dropped, 0.0)
    return loss.sum() if reduction == "sum" else loss.sum(dim=1)
