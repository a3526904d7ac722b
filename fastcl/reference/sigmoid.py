"""Reference of the sigmoid loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.reference.distributed import WholeBatch
from fastcl.reference.similarity import diagonal_mask, logits_matrix
from fastcl.reference.softmax import normalized, reduce


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    ids: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    normalize: bool = False,
    group: Any | None = None,
    mode: Literal["auto", "gather", "ring"] = "auto",
    reduce_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Reference of :func:`fastcl.siglip_loss`."""
    if group is not None:
        batch = WholeBatch(group, image_features)
        image, text = batch.gather(image_features), batch.gather(text_features)
        how: dict[str, Any] = {"ids": batch.ids(ids), "normalize": normalize, "reduction": "none"}
        return batch.share(siglip_loss(image, text, logit_scale, logit_bias, **how), reduction)
    if normalize:
        image_features, text_features = normalized(image_features, text_features)
    logits = logits_matrix(image_features, text_features, logit_scale)
    if isinstance(logit_bias, Tensor):
        logit_bias = logit_bias.to(logits.dtype).reshape(())
    logits = logits + logit_bias
    positive = diagonal_mask(logits, 0)
    loss = -F.logsigmoid(torch.where(positive, logits, -logits))
    if ids is not None:
        loss = loss.masked_fill((ids[:, None] == ids[None, :]) & ~positive, 0.0)
    return reduce(loss.sum(dim=1), reduction)
