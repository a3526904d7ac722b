"""Contrastive losses for PyTorch whose memory grows with N, not N x N."""

from fastcl import caching, compat, distributed, functional, losses, reference
from fastcl._version import __version__
from fastcl.caching import GradCache, grad_cache
from fastcl.functional import clip_loss, info_nce, nt_xent, siglip_loss
from fastcl.kernels import available_backends, use_backend
from fastcl.similarity import (
    explain,
    similarity_logsumexp,
    similarity_sigmoid,
    similarity_weighted_logsumexp,
)

__all__ = [
    "GradCache",
    "__version__",
    "available_backends",
    "caching",
    "clip_loss",
    "compat",
    "distributed",
    "explain",
    "functional",
    "grad_cache",
    "info_nce",
    "losses",
    "nt_xent",
    "reference",
    "siglip_loss",
    "similarity_logsumexp",
    "similarity_sigmoid",
    "similarity_weighted_logsumexp",
    "use_backend",
]
