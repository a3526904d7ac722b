"""The streamed primitives, their operators and what they accept."""

from fastcl.similarity.explain import Explanation, explain
from fastcl.similarity.logsumexp import similarity_logsumexp
from fastcl.similarity.sigmoid import similarity_sigmoid
from fastcl.similarity.statistics import pair_statistics
from fastcl.similarity.weighted_logsumexp import similarity_weighted_logsumexp

__all__ = [
    "Explanation",
    "explain",
    "pair_statistics",
    "similarity_logsumexp",
    "similarity_sigmoid",
    "similarity_weighted_logsumexp",
]
