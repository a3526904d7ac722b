"""The streamed primitives as PyTorch custom operators, with their gradients.

Each forward is one operator, and so is each backward, so that ``torch.compile`` sees opaque calls
with known shapes, and so that a second derivative is refused with a clear error rather than being
silently wrong. The bodies only unpack arguments, switch autocast off, and call a backend.
"""

from fastcl.similarity.ops.normalize import normalize, normalize_backward
from fastcl.similarity.ops.pairs import pair_similarity, pair_similarity_backward
from fastcl.similarity.ops.sigmoid import sigmoid_rows, sigmoid_rows_backward
from fastcl.similarity.ops.softmax import logsumexp, logsumexp_backward
from fastcl.similarity.ops.sums import scaled, sigmoid_sum, weighted_logsumexp

__all__ = [
    "logsumexp",
    "logsumexp_backward",
    "normalize",
    "normalize_backward",
    "pair_similarity",
    "pair_similarity_backward",
    "scaled",
    "sigmoid_rows",
    "sigmoid_rows_backward",
    "sigmoid_sum",
    "weighted_logsumexp",
]
