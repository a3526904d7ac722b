"""Similarities of each query with its own key, or with its own keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.kernels.dtypes import vector_dtype
from fastcl.kernels.plan import row_slices
from fastcl.similarity.ops.common import operator, refuse_second_derivative, where_needed


def _pair_slices(keys: Tensor) -> Iterator[slice]:
    return row_slices(keys.shape[0], keys.shape[1:].numel())


def _pair_body(query: Tensor, keys: Tensor) -> Tensor:
    dtype = vector_dtype(query)
    out = query.new_empty(keys.shape[:-1], dtype=dtype)
    for part in _pair_slices(keys):
        q = query[part].to(dtype)
        out[part] = (keys[part].to(dtype) * (q if keys.dim() == 2 else q[:, None])).sum(dim=-1)
    return out


pair_similarity = operator(
    "pair_similarity",
    "(Tensor query, Tensor keys) -> Tensor",
    _pair_body,
    lambda query, keys: query.new_empty(keys.shape[:-1], dtype=vector_dtype(query)),
)


def _pair_backward_body(
    grad: Tensor, query: Tensor, keys: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dq = torch.empty_like(query) if needs[0] else query.new_empty(0)
    dk = torch.empty_like(keys) if needs[1] else query.new_empty(0)
    for part in _pair_slices(keys):
        g = grad[part, ..., None]
        q = query[part].to(grad.dtype)
        if needs[0]:
            product = g * keys[part].to(grad.dtype)
            dq[part] = product if keys.dim() == 2 else product.sum(dim=1)
        if needs[1]:
            dk[part] = g * (q if keys.dim() == 2 else q[:, None])
    return dq, dk


pair_similarity_backward = operator(
    "pair_similarity_backward",
    "(Tensor grad, Tensor query, Tensor keys, bool[] needs) -> (Tensor, Tensor)",
    _pair_backward_body,
    lambda grad, query, keys, needs: (
        torch.empty_like(query) if needs[0] else query.new_empty(0),
        torch.empty_like(keys) if needs[1] else query.new_empty(0),
    ),
)
refuse_second_derivative(pair_similarity_backward)


def _pair_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    return where_needed(pair_similarity_backward(grad, *ctx.saved_tensors, needs), needs)


pair_similarity.register_autograd(
    _pair_grad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
