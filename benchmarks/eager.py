"""The losses as people write them in eager PyTorch: every one stores its N x M matrix.

Arguments are those of :mod:`benchmarks.inputs`, in that order. Nothing is widened: the arithmetic
is that of the inputs' dtype, as in the code that these stand for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import TEMPERATURE

LossFunction = Callable[..., Tensor]


def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on one process: a matrix product for each direction."""
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def clip_transposed(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's own form, and that of transformers: the second direction is the transposed matrix."""
    per_image = logit_scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_image.T, labels)) / 2


def siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss on one process: labels of -1 with +1 on the diagonal."""
    logits = logit_scale * image @ text.T + logit_bias
    labels = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    """Cross-entropy over in-batch negatives, one direction."""
    logits = query @ positive_key.T / TEMPERATURE["info_nce"]
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def moco(query: Tensor, positive_key: Tensor, queue: Tensor) -> Tensor:
    """MoCo: the positive's logit in front of those of the queue."""
    positive = (query * positive_key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / TEMPERATURE["moco"]
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, labels)


def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    """SimCLR: both views in one matrix, the diagonal masked."""
    z = torch.cat([z0, z1])
    logits = z @ z.T / TEMPERATURE["nt_xent"]
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(own, float("-inf"))
    labels = torch.arange(len(z), device=z.device).roll(len(z0))
    return F.cross_entropy(logits, labels)


EAGER: dict[str, LossFunction] = {
    "clip": clip,
    "siglip": siglip,
    "info_nce": info_nce,
    "nt_xent": nt_xent,
    "moco": moco,
}
# Another way in which people write the same loss, where it is faster or slower.
EAGER_VARIANTS: dict[str, LossFunction] = {"clip": clip_transposed}
