"""A weighted sum of row logsumexps, whose gradient is made in the forward."""

from __future__ import annotations

from torch import Tensor

from fastcl import reference
from fastcl.kernels import dispatch
from fastcl.similarity import ops
from fastcl.similarity.arguments import check_stream
from fastcl.similarity.inputs import check_divisor, check_transforms, check_vector


def similarity_weighted_logsumexp(
    u: Tensor,
    v: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positives: int | None = None,
    add_zero: bool = False,
    divisor: int = 1,
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    r"""Weighted sum of row logsumexps, whose gradient is made together with its value.

    .. math:: \sum_i w_i \log \sum_j e^{l_{ij}}, \qquad
        \text{or with positives:}\quad \sum_i w_i \log\Bigl(1 + \sum_j e^{l_{ij} - l_{i,i+p}}\Bigr)

    As the weights are known before the first tile, each row of tiles can be turned into its
    gradient while it is there: three products in all where a few hundred full rows fit the
    workspace, four where they do not, and two where only `u` needs a gradient.

    Args:
        u: [N, D]; v: [M, D]; float32, bfloat16, float16 or float64.
        weights: [N], or None for ones. Differentiable.
        scale, row_bias, col_bias, row_ids, col_ids, backend, workspace: as for
            :func:`similarity_logsumexp`.
        positives: p, where the pairs (i, i + p) are each row's positive: they leave the sum, and
            the other logits are taken relative to theirs. This is InfoNCE, exact however small.
        add_zero: with no positives, add a logit 0 to every row (pass minus the positive's logit as
            `row_bias` for positives that are not rows of v).
        divisor: divide the sum by this count; a 16-bit gradient is then rounded once.

    Returns:
        A 0-dim tensor, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or choices that do not fit.

    Example:
        >>> import fastcl, torch
        >>> q, k = torch.randn(6, 4), torch.randn(6, 4)
        >>> loss = fastcl.similarity_weighted_logsumexp(q, k, scale=10.0, positives=0, divisor=6)
        >>> torch.allclose(loss, fastcl.info_nce(q, k, temperature=0.1))
        True

    Source: van den Oord et al. 2018, eq. 4; gradient in the forward as in Cut Cross Entropy
    (Wijmans et al. 2024) and Liger's fused linear cross-entropy.
    """
    if v is None:
        raise TypeError("v must be a tensor [M, D]; similarity_logsumexp serves v = u")
    args = check_stream(
        u, v, scale, row_bias, col_bias, row_ids, col_ids, backend, workspace, positives=positives
    )
    positives = args.diagonal
    if positives is not None:
        if add_zero:
            raise ValueError("add_zero stands for a positive that is no row of v: drop positives")
        if row_bias is not None:
            raise ValueError("row_bias has no effect with positives: it cancels in l_ij - l_ii")
        if args.u.shape[0] + positives > v.shape[0]:
            raise ValueError(
                f"positives={positives} puts row {args.u.shape[0] - 1}'s positive past the last of "
                f"v's {v.shape[0]} rows; expected at least {args.u.shape[0] + positives} rows"
            )
    divisor = check_divisor(divisor)
    weights = check_vector("weights", weights, args.u.shape[0], args.u)
    if add_zero and row_bias is not None:  # enters after the stream: kept as exact as it came
        args = args._replace(row_bias=row_bias.to(args.u.device))
    if args.backend == dispatch.REFERENCE:
        return reference.similarity_weighted_logsumexp(
            args.u,
            args.keys,
            weights,
            **args.logits,
            positives=positives,
            add_zero=add_zero,
            divisor=divisor,
        )
    check_transforms(weights)
    total: Tensor = ops.weighted_logsumexp(*args, weights, divisor, add_zero, args.needs)[0]
    return total
