"""Rows divided by their L2 norm: what is kept for the gradient is the input and the norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcl.kernels import dispatch
from fastcl.kernels.dtypes import accumulation_dtype
from fastcl.similarity.ops.common import operator, refuse_second_derivative


def _contiguous(x: Tensor, dtype: Any = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


normalize = operator(
    "normalize",
    "(Tensor x, str backend) -> (Tensor, Tensor)",
    lambda x, backend: dispatch.get(backend).normalize(x),
    lambda x, backend: (
        _contiguous(x),
        x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype)),
    ),
)
normalize_backward = operator(
    "normalize_backward",
    "(Tensor grad, Tensor x, Tensor norm, str backend) -> Tensor",
    lambda grad, x, norm, backend: dispatch.get(backend).normalize_backward(grad, x, norm),
    lambda grad, x, norm, backend: _contiguous(x),
)
refuse_second_derivative(normalize_backward)


def _save(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1])


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return normalize_backward(grad, *ctx.saved_tensors, ctx.backend), None


normalize.register_autograd(_gradient, setup_context=_save)
