"""What every operator shares: its leading arguments, registration, empty gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Gradients, Stream
from fastcl.kernels.dtypes import accumulation_dtype

# The arguments that describe a stream lead every operator, in this order.
STREAM = (
    "Tensor u, Tensor? v, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids, "
    "Tensor? col_ids, SymInt? diagonal, str backend, int workspace"
)
STREAM_ARGS = 10
TENSORS = 7  # of those, the leading ones: all before the diagonal
DIFFERENTIABLE = 5  # of those again, the ones that have a gradient: u, v, scale, the biases
GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor"


def unpack(args: Sequence[Any]) -> tuple[dispatch.Backend, Stream, Sequence[Any]]:
    """The backend, the stream, and what else an operator was given."""
    leading, rest = args[:STREAM_ARGS], args[STREAM_ARGS:]
    u, v, scale, row_bias, col_bias, row_ids, col_ids, diagonal, name, workspace = leading
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
    return dispatch.get(name), stream, rest


def operator(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an operator whose body runs with autocast off."""

    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return body(*args)

    op = torch.library.custom_op(f"fastcl::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def refuse_second_derivative(op: Any) -> None:
    """Makes a backward operator say that it has no derivative of its own."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            "fastcl's streamed losses can be differentiated once; for second derivatives "
            '(create_graph=True, torch.func.hessian) use backend="reference", which is ordinary '
            "PyTorch and stores the similarity matrix"
        )

    op.register_autograd(backward)


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator may not return None."""
    return like.new_empty(0) if x is None else x


def filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """A backend's gradients as an operator returns them."""
    return tuple(or_empty(g, like) for g in gradients)


def fake_gradients(args: Sequence[Any], needs: Sequence[bool], stored: bool) -> tuple[Tensor, ...]:
    """Shapes of the five gradients; `stored`: as they wait for the backward, to be rounded then."""
    dtype = accumulation_dtype(args[0].dtype) if stored else args[0].dtype
    shapes = []
    for x, wanted in zip(args[:DIFFERENTIABLE], needs, strict=True):
        embeddings = x is not None and x.dim() == 2
        if not wanted or x is None:
            shapes.append(args[2].new_empty(0))  # as or_empty: like the scale
        else:
            shapes.append(x.new_empty(x.shape, dtype=dtype if embeddings else x.dtype))
    return tuple(shapes)


def diagonal_length(u: Tensor, v: Tensor | None, diagonal: int | None) -> int:
    """How many pairs lie on the dropped diagonal; sizes may be symbolic."""
    if diagonal is None:
        return 0
    length: int = torch.sym_min(u.shape[0], (u if v is None else v).shape[0] - diagonal)  # type: ignore[no-untyped-call]
    return length


def where_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients as autograd takes them: None for the empty ones."""
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def save_stream(ctx: Any, inputs: Sequence[Any], *kept: Tensor) -> None:
    """Keeps a stream's tensors and plain arguments; `kept` outputs are not differentiable."""
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], *kept)
    ctx.plain = inputs[TENSORS:STREAM_ARGS]
