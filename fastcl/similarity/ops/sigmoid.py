"""The sigmoid loss, row by row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcl.kernels.dispatch import LineGradients, Needs
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
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


def _sigmoid_rows_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, _ = unpack(args)
    rows, pairs = backend.sigmoid_rows(stream)
    if pairs is None:
        return rows, *(or_empty(None, stream.scale) for _ in range(2))
    count = diagonal_length(stream.u, stream.v, stream.diagonal)
    return rows, pairs.logits[:count].to(rows.dtype), pairs.s


def _sigmoid_rows_fake(*args: Any) -> tuple[Tensor, ...]:
    u, diagonal = args[0], args[TENSORS]
    rows = u.new_empty(u.shape[0], dtype=vector_dtype(u))
    if diagonal is None:
        return rows, *(u.new_empty(0, dtype=accumulation_dtype(u.dtype)) for _ in range(2))
    logits = u.new_empty(diagonal_length(u, args[1], diagonal), dtype=vector_dtype(u))
    return rows, logits, u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


sigmoid_rows = operator(
    "sigmoid_rows",
    f"({STREAM}) -> (Tensor, Tensor, Tensor)",
    _sigmoid_rows_body,
    _sigmoid_rows_fake,
)


def _sigmoid_rows_backward_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (pair_s, grad_rows, grad_pairs, needs) = unpack(args)
    grads = LineGradients(
        rows=None if grad_rows is None else grad_rows.contiguous(), pairs=grad_pairs
    )
    gradients = backend.sigmoid_rows_backward(stream, pair_s, grads, Needs(*needs))
    return filled(gradients, stream.scale)


sigmoid_rows_backward = operator(
    "sigmoid_rows_backward",
    f"({STREAM}, Tensor pair_s, Tensor? grad_rows, Tensor? grad_pairs, bool[] needs) -> "
    f"({GRADIENTS})",
    _sigmoid_rows_backward_body,
    lambda *args: fake_gradients(args, args[-1], stored=False),
)
refuse_second_derivative(sigmoid_rows_backward)


def _sigmoid_rows_grad(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:DIFFERENTIABLE]
    result = sigmoid_rows_backward(
        *saved[:TENSORS], *ctx.plain, saved[TENSORS], *grads[:2], list(needs)
    )
    return where_needed(result, needs) + (None,) * (STREAM_ARGS - DIFFERENTIABLE)


sigmoid_rows.register_autograd(
    _sigmoid_rows_grad,
    setup_context=lambda ctx, inputs, output: save_stream(ctx, inputs, output[2]),
)
