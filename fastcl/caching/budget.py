"""How many rows of an encoder's activations fit a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcl.caching.chunks import devices_of, leaves, part_of, rows_of
from fastcl.caching.modules import modules_of, without_sums
from fastcl.caching.replay import Surroundings


def activation_bytes(encoder: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that autograd saves for the backward of one call, weights and inputs left out.

    Random numbers are as before afterwards.

    Example:
        >>> import fastcl, torch
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh())
        >>> fastcl.caching.activation_bytes(encoder, torch.randn(10, 8))  # tanh's [10, 4]
        160
    """
    saved: dict[int, int] = {}
    own = [x for _, x in leaves((args, kwargs))]
    for module in modules_of(encoder):
        own += [*module.parameters(), *module.buffers()]
    given = {x.untyped_storage().data_ptr() for x in own}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    before = Surroundings.now(devices_of((args, kwargs), modules_of(encoder)))
    with (
        torch.enable_grad(),
        without_sums(encoder),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        out = encoder(*args, **kwargs)  # alive to the end: storages are told apart by address
    before.restore()
    del out
    return sum(saved.values())


def fitting_rows(
    encoder: Callable[..., Any], memory_budget: int, *args: Any, **kwargs: Any
) -> tuple[int, int]:
    """(rows of a chunk whose activations fit the budget, chunks that fit it together).

    From two small calls, between which activations grow with the rows: measured, not known, so
    leave room for what a forward and a backward need beside them.

    Args:
        encoder: a module or function.
        memory_budget: bytes.
        args, kwargs: its inputs, of the whole batch.

    Returns:
        At least 1 each, and no more rows than the batch has.

    Raises:
        ValueError: if one row does not fit.
    """
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 1:
        raise ValueError(f"memory_budget is {memory_budget!r}; expected a number of bytes")
    inputs = (args, kwargs)
    rows = rows_of(inputs)
    few, more = min(rows, 2), min(rows, 6)
    sizes = []
    for n in (few, more):
        some, named = part_of(inputs, 0, n, rows)
        sizes.append(activation_bytes(encoder, *some, **named))
    each = (sizes[1] - sizes[0]) / (more - few) if more > few else sizes[0] / max(1, few)
    fixed = max(0.0, sizes[0] - few * each)
    if fixed + each > memory_budget:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes, and one row's activations are about "
            f"{round(fixed + each)}: give more, or checkpoint inside the encoder"
        )
    size = rows if each <= 0 else min(rows, int((memory_budget - fixed) / each))
    size = max(1, size)
    return size, max(1, int(memory_budget / (fixed + each * size)) if each > 0 else 1)
