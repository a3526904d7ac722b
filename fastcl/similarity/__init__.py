"""The streamed primitives, their operators and what they accept."""

from fastcl.similarity.primitives import (
    pair_statistics,
    similarity_logsumexp,
    similarity_sigmoid,
    similarity_weighted_logsumexp,
)

__all__ = [
    "pair_statistics",
    "similarity_logsumexp",
    "similarity_sigmoid",
    "similarity_weighted_logsumexp",
]
