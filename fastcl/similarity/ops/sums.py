"""Sums whose gradient is made in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.kernels.dispatch import Needs
from fastcl.kernels.dtypes import accumulation_dtype, vector_dtype
from fastcl.kernels.plan import row_slices
from fastcl.similarity.ops.common import (
    DIFFERENTIABLE,
    GRADIENTS,
    STREAM,
    STREAM_ARGS,
    fake_gradients,
    filled,
    operator,
    refuse_second_derivative,
    unpack,
    where_needed,
)


def _scaled_body(
    grad: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """grad_output times gradients of unit weight, in float32, in fresh tensors.

    `inputs`, which the gradients came from, are there for autograd alone: through them a second
    derivative reaches this operator and is refused, where it would be silently zero without them.
    """
    out = []
    for g in gradients:
        result = torch.empty_like(g, dtype=dtype if g.dim() == 2 else g.dtype)
        for part in row_slices(g.shape[0], g.shape[1:].numel()) if g.dim() else [...]:
            result[part] = g[part].to(grad.dtype) * grad
        out.append(result)
    return out


scaled = operator(
    "scaled",
    "(Tensor grad, Tensor[] gradients, Tensor[] inputs, ScalarType dtype) -> Tensor[]",
    _scaled_body,
    lambda grad, gradients, inputs, dtype: [
        torch.empty_like(g, dtype=dtype if g.dim() == 2 else g.dtype) for g in gradients
    ],
)
refuse_second_derivative(scaled)


def _save_made(ctx: Any, inputs: Sequence[Any], made: Sequence[Tensor], *more: Tensor) -> None:
    """Keeps gradients that the forward made; they and `more` are not differentiable outputs."""
    ctx.mark_non_differentiable(*made, *more)
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-1]
    origins = [x for x, wanted in zip(inputs[:DIFFERENTIABLE], ctx.needs, strict=True) if wanted]
    origins += [x for x in inputs[STREAM_ARGS:] if isinstance(x, Tensor)]  # weights
    if not origins:
        origins = [inputs[0]]
    ctx.save_for_backward(*made, *more, *origins)
    ctx.dtype = inputs[0].dtype


def _made_gradients(
    ctx: Any, grad: Tensor, made: Sequence[Tensor], origins: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    return where_needed(scaled(grad, list(made), list(origins), ctx.dtype), ctx.needs)


def _weighted_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (weights, divisor, add_zero, needs) = unpack(args)
    if weights is None:
        weights = stream.u.new_ones(len(stream.u), dtype=vector_dtype(stream.scale))
    weights = weights.to(vector_dtype(stream.scale)) / divisor
    values, gradients = backend.weighted_logsumexp(stream, weights, add_zero, Needs(*needs))
    total = torch.dot(values, weights).to(accumulation_dtype(stream.u.dtype))
    return (total, values / divisor, *filled(gradients, stream.scale))


def _weighted_fake(*args: Any) -> tuple[Tensor, ...]:
    u = args[0]
    total = u.new_empty((), dtype=accumulation_dtype(u.dtype))
    values = u.new_empty(u.shape[0], dtype=vector_dtype(u))
    return (total, values, *fake_gradients(args, args[-1], True))


weighted_logsumexp = operator(
    "weighted_logsumexp",
    f"({STREAM}, Tensor? weights, SymInt divisor, bool add_zero, bool[] needs) -> "
    f"(Tensor, Tensor, {GRADIENTS})",
    _weighted_body,
    _weighted_fake,
)

_MADE = DIFFERENTIABLE + 1  # tensors that the forward made: five gradients and the values


def _weighted_setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _save_made(ctx, inputs, output[2:], output[1])


def _weighted_grad(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (STREAM_ARGS + 4)
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    made, values, origins = saved[:DIFFERENTIABLE], saved[DIFFERENTIABLE], saved[_MADE:]
    *gradients, of_weights = scaled(grad, [*made, values], list(origins), ctx.dtype)
    wanted = ctx.needs_input_grad[STREAM_ARGS]
    rest = (None,) * (STREAM_ARGS - DIFFERENTIABLE)
    of_weights = of_weights.to(grad.dtype) if wanted else None
    return (*where_needed(gradients, ctx.needs), *rest, of_weights, None, None, None)


weighted_logsumexp.register_autograd(_weighted_grad, setup_context=_weighted_setup)


def _sigmoid_sum_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (divisor, needs) = unpack(args)
    total, gradients = backend.sigmoid_sum(stream, divisor, Needs(*needs))
    return (total.to(accumulation_dtype(stream.u.dtype)), *filled(gradients, stream.scale))


sigmoid_sum = operator(
    "sigmoid_sum",
    f"({STREAM}, SymInt divisor, bool[] needs) -> (Tensor, {GRADIENTS})",
    _sigmoid_sum_body,
    lambda *args: (
        args[0].new_empty((), dtype=accumulation_dtype(args[0].dtype)),
        *fake_gradients(args, args[-1], True),
    ),
)


def _sigmoid_sum_setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _save_made(ctx, inputs, output[1:])


def _sigmoid_sum_grad(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (STREAM_ARGS + 2)
    rest = (None,) * (STREAM_ARGS + 2 - DIFFERENTIABLE)
    saved = ctx.saved_tensors
    made, origins = saved[:DIFFERENTIABLE], saved[DIFFERENTIABLE:]
    return (*_made_gradients(ctx, grad, made, origins), *rest)


sigmoid_sum.register_autograd(_sigmoid_sum_grad, setup_context=_sigmoid_sum_setup)
