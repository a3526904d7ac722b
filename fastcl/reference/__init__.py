"""The specification: every public function in plain PyTorch, with the same signature.

These materialise the N x M matrix and use nothing of the rest of the package.
They run on any device, in any floating dtype, and can be differentiated twice.
16-bit inputs are widened to float32 first; give float64 inputs for the truth.
With ``group`` every rank gathers the whole batch and computes all of its loss. The arguments
``backend``, ``workspace``, ``mode`` and ``reduce_dtype`` are accepted and have no effect.
"""

from fastcl.reference.sigmoid import siglip_loss
from fastcl.reference.similarity import (
    similarity_logsumexp,
    similarity_sigmoid,
    similarity_weighted_logsumexp,
)
from fastcl.reference.softmax import clip_loss, info_nce, nt_xent

__all__ = [
    "clip_loss",
    "info_nce",
    "nt_xent",
    "siglip_loss",
    "similarity_logsumexp",
    "similarity_sigmoid",
    "similarity_weighted_logsumexp",
]
