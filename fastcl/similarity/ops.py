"""The streamed primitives as PyTorch custom operators, with their gradients.

Each forward is one operator, and so is each backward, so that ``torch.compile`` sees opaque calls
with known shapes, and so that a second derivative is refused with a clear error rather than being
silently wrong. The bodies only unpack arguments, switch autocast off, and call a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Gradients, LineGradients, LineStatistics, Needs, Stream
from fastcl.kernels.dtypes import accumulation_dtype, stored_dtype, vector_dtype
from fastcl.kernels.plan import row_slices
from fastcl.kernels.tiles import Pairs, Running

# The arguments that describe a stream lead every operator, in this order.
_STREAM = (
    "Tensor u, Tensor? v, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids, "
    "Tensor? col_ids, SymInt? diagonal, str backend, int workspace"
)
_STREAM_ARGS = 10
_DIFFERENTIABLE = 5  # of those, the leading ones that have a gradient: u, v, scale, the biases
_GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor"


def _unpack(args: Sequence[Any]) -> tuple[dispatch.Backend, Stream, Sequence[Any]]:
    u, v, scale, row_bias, col_bias, row_ids, col_ids, diagonal, name, workspace = args[:10]
    stream = Stream(
        u,
        v,
        scale.contiguous(),
        None if row_bias is None else row_bias.contiguous(),
        None if col_bias is None else col_bias.contiguous(),
        row_ids,
        col_ids,
        diagonal,
        workspace,
    )
    return dispatch.get(name), stream, args[_STREAM_ARGS:]


def _operator(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an operator whose body runs with autocast off."""

    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return body(*args)

    op = torch.library.custom_op(f"fastcl::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def _refuse_second_derivative(op: Any) -> None:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            "fastcl's streamed losses can be differentiated once; for second derivatives "
            '(create_graph=True, torch.func.hessian) use backend="reference", which is ordinary '
            "PyTorch and stores the similarity matrix"
        )

    op.register_autograd(backward)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator may not return None."""
    return like.new_empty(0) if x is None else x


def _filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(_or_empty(g, like) for g in gradients)


def _fake_gradients(args: Sequence[Any], needs: Sequence[bool], stored: bool) -> tuple[Tensor, ...]:
    """Shapes of the five gradients; `stored`: as they wait for the backward."""
    dtype = stored_dtype(args[0].dtype) if stored else args[0].dtype
    shapes = []
    for x, wanted in zip(args[:_DIFFERENTIABLE], needs, strict=True):
        embeddings = x is not None and x.dim() == 2
        if not wanted or x is None:
            shapes.append(args[2].new_empty(0))  # as _or_empty: like the scale
        else:
            shapes.append(x.new_empty(x.shape, dtype=dtype if embeddings else x.dtype))
    return tuple(shapes)


def _diagonal_length(u: Tensor, v: Tensor | None, diagonal: int | None) -> int:
    if diagonal is None:
        return 0
    length: int = torch.sym_min(u.shape[0], (u if v is None else v).shape[0] - diagonal)  # type: ignore[no-untyped-call]
    return length


def _wanted(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if wanted else None for g, wanted in zip(grads, needs, strict=True))


# ---- logsumexp by rows, by columns, or both ---------------------------------------------------
#
# In two parts: log sum_j e^(l_ij - max_i) is the differentiable output, the maximum is kept beside
# it. Their sum would round away what a small loss consists of.


def _logsumexp_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (rows, cols) = _unpack(args)
    of_rows, of_cols, pairs = backend.logsumexp(stream, rows, cols)
    dtype, count = vector_dtype(stream.scale), _diagonal_length(stream.u, stream.v, stream.diagonal)
    rest = [None if x is None else x.sum.to(dtype).log() for x in (of_rows, of_cols)]
    logits = None if pairs is None else pairs.logits[:count].to(dtype)
    kept = [x for line in (of_rows, of_cols) for x in _parts(line)]
    kept.append(None if pairs is None else pairs.s)
    return tuple(_or_empty(x, stream.scale) for x in (*rest, logits, *kept))


def _parts(running: Running | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if running is None else (running.max, running.sum)


def _logsumexp_fake(*args: Any) -> tuple[Tensor, ...]:
    u, v, diagonal, (rows, cols) = args[0], args[1], args[7], args[_STREAM_ARGS:]
    keys = u if v is None else v
    n, m = u.shape[0] if rows else 0, keys.shape[0] if cols else 0
    pairs = _diagonal_length(u, v, diagonal)
    given = (rows, cols, diagonal is not None)
    values = [
        u.new_empty(size, dtype=vector_dtype(u) if there else accumulation_dtype(u.dtype))
        for size, there in zip((n, m, pairs), given, strict=True)
    ]
    kept = (n, n, m, m, 0 if diagonal is None else u.shape[0])
    return (*values, *(u.new_empty(size, dtype=accumulation_dtype(u.dtype)) for size in kept))


logsumexp = _operator(
    "logsumexp",
    f"({_STREAM}, bool rows, bool cols) -> ({', '.join(['Tensor'] * 8)})",
    _logsumexp_body,
    _logsumexp_fake,
)


def _logsumexp_backward_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, rest = _unpack(args)
    row_max, row_sum, col_max, col_sum, pair_s, *grads, needs = rest
    statistics = LineStatistics(
        Running(row_max, row_sum) if len(row_max) else None,
        Running(col_max, col_sum) if len(col_max) else None,
        Pairs(pair_s, pair_s) if len(pair_s) else None,
    )
    gradients = backend.logsumexp_backward(stream, statistics, LineGradients(*grads), Needs(*needs))
    return _filled(gradients, stream.scale)


_logsumexp_backward = _operator(
    "logsumexp_backward",
    f"({_STREAM}, Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor pair_s, "
    f"Tensor? grad_rows, Tensor? grad_cols, Tensor? grad_pairs, bool[] needs) -> ({_GRADIENTS})",
    _logsumexp_backward_body,
    lambda *args: _fake_gradients(args, args[-1], stored=False),
)
_refuse_second_derivative(_logsumexp_backward)


def _save_stream(ctx: Any, inputs: Sequence[Any], *kept: Tensor) -> None:
    """Keeps a stream's tensors and plain arguments; `kept` outputs are not differentiable."""
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *kept)
    ctx.plain = inputs[7:_STREAM_ARGS]


def _logsumexp_setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _save_stream(ctx, inputs, *output[3:])


def _logsumexp_grad(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:_DIFFERENTIABLE]
    result = _logsumexp_backward(*saved[:7], *ctx.plain, *saved[7:], *grads[:3], list(needs))
    return _wanted(result, needs) + (None,) * (_STREAM_ARGS + 2 - _DIFFERENTIABLE)


logsumexp.register_autograd(_logsumexp_grad, setup_context=_logsumexp_setup)


# ---- sums whose gradient is made in the forward -----------------------------------------------


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


_scaled = _operator(
    "scaled",
    "(Tensor grad, Tensor[] gradients, Tensor[] inputs, ScalarType dtype) -> Tensor[]",
    _scaled_body,
    lambda grad, gradients, inputs, dtype: [
        torch.empty_like(g, dtype=dtype if g.dim() == 2 else g.dtype) for g in gradients
    ],
)
_refuse_second_derivative(_scaled)


def _save_made(ctx: Any, inputs: Sequence[Any], made: Sequence[Tensor], *more: Tensor) -> None:
    """Keeps gradients that the forward made; they and `more` are not differentiable outputs."""
    ctx.mark_non_differentiable(*made, *more)
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-1]
    origins = [x for x, wanted in zip(inputs[:_DIFFERENTIABLE], ctx.needs, strict=True) if wanted]
    if not origins:
        origins = [inputs[0]]
    ctx.save_for_backward(*made, *more, *origins)
    ctx.dtype = inputs[0].dtype


def _made_gradients(
    ctx: Any, grad: Tensor, made: Sequence[Tensor], origins: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    return _wanted(_scaled(grad, list(made), list(origins), ctx.dtype), ctx.needs)


def _weighted_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (weights, divisor, add_zero, needs) = _unpack(args)
    if weights is None:
        weights = stream.u.new_ones(len(stream.u), dtype=vector_dtype(stream.scale))
    weights = weights.to(vector_dtype(stream.scale)) / divisor
    values, gradients = backend.weighted_logsumexp(stream, weights, add_zero, Needs(*needs))
    total = torch.dot(values, weights).to(accumulation_dtype(stream.u.dtype))
    return (total, values / divisor, *_filled(gradients, stream.scale))


def _weighted_fake(*args: Any) -> tuple[Tensor, ...]:
    u = args[0]
    total = u.new_empty((), dtype=accumulation_dtype(u.dtype))
    values = u.new_empty(u.shape[0], dtype=vector_dtype(u))
    return (total, values, *_fake_gradients(args, args[-1], True))


weighted_logsumexp = _operator(
    "weighted_logsumexp",
    f"({_STREAM}, Tensor? weights, SymInt divisor, bool add_zero, bool[] needs) -> "
    f"(Tensor, Tensor, {_GRADIENTS})",
    _weighted_body,
    _weighted_fake,
)


_MADE = _DIFFERENTIABLE + 1  # tensors that the forward made: five gradients and the values


def _weighted_setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _save_made(ctx, inputs, output[2:], output[1])


def _weighted_grad(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (_STREAM_ARGS + 4)
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    made, values, origins = saved[:_DIFFERENTIABLE], saved[_DIFFERENTIABLE], saved[_MADE:]
    *scaled, of_weights = _scaled(grad, [*made, values], list(origins), ctx.dtype)
    wanted = ctx.needs_input_grad[_STREAM_ARGS]
    rest = (None,) * (_STREAM_ARGS - _DIFFERENTIABLE)
    of_weights = of_weights.to(grad.dtype) if wanted else None
    return (*_wanted(scaled, ctx.needs), *rest, of_weights, None, None, None)


weighted_logsumexp.register_autograd(_weighted_grad, setup_context=_weighted_setup)


def _sigmoid_sum_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (divisor, needs) = _unpack(args)
    total, gradients = backend.sigmoid_sum(stream, divisor, Needs(*needs))
    return (total.to(accumulation_dtype(stream.u.dtype)), *_filled(gradients, stream.scale))


sigmoid_sum = _operator(
    "sigmoid_sum",
    f"({_STREAM}, SymInt divisor, bool[] needs) -> (Tensor, {_GRADIENTS})",
    _sigmoid_sum_body,
    lambda *args: (
        args[0].new_empty((), dtype=accumulation_dtype(args[0].dtype)),
        *_fake_gradients(args, args[-1], True),
    ),
)


def _sigmoid_sum_setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _save_made(ctx, inputs, output[1:])


def _sigmoid_sum_grad(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (_STREAM_ARGS + 2)
    rest = (None,) * (_STREAM_ARGS + 2 - _DIFFERENTIABLE)
    saved = ctx.saved_tensors
    made, origins = saved[:_DIFFERENTIABLE], saved[_DIFFERENTIABLE:]
    return (*_made_gradients(ctx, grad, made, origins), *rest)


sigmoid_sum.register_autograd(_sigmoid_sum_grad, setup_context=_sigmoid_sum_setup)


# ---- sigmoid, row by row ----------------------------------------------------------------------


def _sigmoid_rows_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, _ = _unpack(args)
    rows, pairs = backend.sigmoid_rows(stream)
    if pairs is None:
        return rows, *(_or_empty(None, stream.scale) for _ in range(2))
    count = _diagonal_length(stream.u, stream.v, stream.diagonal)
    return rows, pairs.logits[:count].to(rows.dtype), pairs.s


def _sigmoid_rows_fake(*args: Any) -> tuple[Tensor, ...]:
    u, diagonal = args[0], args[7]
    rows = u.new_empty(u.shape[0], dtype=vector_dtype(u))
    if diagonal is None:
        return rows, *(u.new_empty(0, dtype=accumulation_dtype(u.dtype)) for _ in range(2))
    logits = u.new_empty(_diagonal_length(u, args[1], diagonal), dtype=vector_dtype(u))
    return rows, logits, u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


sigmoid_rows = _operator(
    "sigmoid_rows",
    f"({_STREAM}) -> (Tensor, Tensor, Tensor)",
    _sigmoid_rows_body,
    _sigmoid_rows_fake,
)


def _sigmoid_rows_backward_body(*args: Any) -> tuple[Tensor, ...]:
    backend, stream, (pair_s, grad_rows, grad_pairs, needs) = _unpack(args)
    grads = LineGradients(
        rows=None if grad_rows is None else grad_rows.contiguous(), pairs=grad_pairs
    )
    gradients = backend.sigmoid_rows_backward(stream, pair_s, grads, Needs(*needs))
    return _filled(gradients, stream.scale)


_sigmoid_rows_backward = _operator(
    "sigmoid_rows_backward",
    f"({_STREAM}, Tensor pair_s, Tensor? grad_rows, Tensor? grad_pairs, bool[] needs) -> "
    f"({_GRADIENTS})",
    _sigmoid_rows_backward_body,
    lambda *args: _fake_gradients(args, args[-1], stored=False),
)
_refuse_second_derivative(_sigmoid_rows_backward)


def _sigmoid_rows_grad(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:_DIFFERENTIABLE]
    result = _sigmoid_rows_backward(*saved[:7], *ctx.plain, saved[7], *grads[:2], list(needs))
    return _wanted(result, needs) + (None,) * (_STREAM_ARGS - _DIFFERENTIABLE)


sigmoid_rows.register_autograd(
    _sigmoid_rows_grad,
    setup_context=lambda ctx, inputs, output: _save_stream(ctx, inputs, output[2]),
)


# ---- pairs of rows ----------------------------------------------------------------------------


def _pair_slices(keys: Tensor) -> Iterator[slice]:
    return row_slices(keys.shape[0], keys[0].numel())


def _pair_body(query: Tensor, keys: Tensor) -> Tensor:
    dtype = vector_dtype(query)
    out = query.new_empty(keys.shape[:-1], dtype=dtype)
    for part in _pair_slices(keys):
        q = query[part].to(dtype)
        out[part] = (keys[part].to(dtype) * (q if keys.dim() == 2 else q[:, None])).sum(dim=-1)
    return out


pair_similarity = _operator(
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


_pair_backward = _operator(
    "pair_similarity_backward",
    "(Tensor grad, Tensor query, Tensor keys, bool[] needs) -> (Tensor, Tensor)",
    _pair_backward_body,
    lambda grad, query, keys, needs: (
        torch.empty_like(query) if needs[0] else query.new_empty(0),
        torch.empty_like(keys) if needs[1] else query.new_empty(0),
    ),
)
_refuse_second_derivative(_pair_backward)


def _pair_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    return _wanted(_pair_backward(grad, *ctx.saved_tensors, needs), needs)


pair_similarity.register_autograd(
    _pair_grad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
