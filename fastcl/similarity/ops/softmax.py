"""Logsumexps by rows, by columns, or both.

In two parts: log sum_j e^(l_ij - max_i) is the differentiable output, the maximum is kept beside
it. Their sum would round away what a small loss consists of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastcl.kernels.dispatch import LineGradients, LineStatistics, Needs
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.tiles import Pairs, Running
from fastcl.similarity.ops.common import (
    DIFFERENTIABLE,
    GRADIENTS,
    STREAM,
    STREAM_ARGS,
    TENSORS,
    diagonal_length,
    fake_gradients,
    filled,
    operator,
    or_empty,
    refuse_second_derivative,
    save_stream,
    unpack,
    where_needed,
)


def _logsumexp_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (rows, cols) = unpack(args)
    of_rows, of_cols, pairs = backend.logsumexp(stream, rows, cols)
    dtype, count = vector_dtype(stream.scale), diagonal_length(stream.u, stream.v, stream.diagonal)
    rest = [None if x is None else x.sum.to(dtype).log() for x in (of_rows, of_cols)]
    logits = None if pairs is None else pairs.logits[:count].to(dtype)
    kept = [x for line in (of_rows, of_cols) for x in _parts(line)]
    kept.append(None if pairs is None else pairs.s)
    return tuple(or_empty(x, stream.scale) for x in (*rest, logits, *kept))


def _parts(running: Running | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if running is None else (running.max, running.sum)


def _logsumexp_fake(*args: Any) -> tuple[Tensor, ...]:
    (u, v), diagonal, (rows, cols) = args[:2], args[TENSORS], args[STREAM_ARGS:]
    keys = u if v is None else v
    n, m = u.shape[0] if rows else 0, keys.shape[0] if cols else 0
    pairs = diagonal_length(u, v, diagonal)
    given = (rows, cols, diagonal is not None)
    values = [
        u.new_empty(size, dtype=vector_dtype(u) if there else accumulation_dtype(u.dtype))
        for size, there in zip((n, m, pairs), given, strict=True)
    ]
    kept = (n, n, m, m, 0 if diagonal is None else u.shape[0])
    return (*values, *(u.new_empty(size, dtype=accumulation_dtype(u.dtype)) for size in kept))


logsumexp = operator(
    "logsumexp",
    f"({STREAM}, bool rows, bool cols) -> ({', '.join(['Tensor'] * 8)})",
    _logsumexp_body,
    _logsumexp_fake,
)


def _logsumexp_backward_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, rest = unpack(args)
    row_max, row_sum, col_max, col_sum, pair_s, *grads, needs = rest
    statistics = LineStatistics(
        Running(row_max, row_sum) if len(row_max) else None,
        Running(col_max, col_sum) if len(col_max) else None,
        Pairs(pair_s, pair_s) if len(pair_s) else None,
    )
    gradients = backend.logsumexp_backward(stream, statistics, LineGradients(*grads), Needs(*needs))
    return filled(gradients, stream.scale)


logsumexp_backward = operator(
    "logsumexp_backward",
    f"({STREAM}, Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor pair_s, "
    f"Tensor? grad_rows, Tensor? grad_cols, Tensor? grad_pairs, bool[] needs) -> ({GRADIENTS})",
    _logsumexp_backward_body,
    lambda *args: fake_gradients(args, args[-1], stored=False),
)
refuse_second_derivative(logsumexp_backward)


def _logsumexp_setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    save_stream(ctx, inputs, *output[3:])


def _logsumexp_grad(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:DIFFERENTIABLE]
    result = logsumexp_backward(
        *saved[:TENSORS], *ctx.plain, *saved[TENSORS:], *grads[:3], list(needs)
    )
    return where_needed(result, needs) + (None,) * (STREAM_ARGS + 2 - DIFFERENTIABLE)


logsumexp.register_autograd(_logsumexp_grad, setup_context=_logsumexp_setup)
