"""Inputs of any nesting, cut into chunks of rows."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def leaves(inputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in it, each with where it is: "[1]['input_ids']"."""
    if isinstance(inputs, Tensor):
        yield path, inputs
    elif isinstance(inputs, Mapping):
        for key in inputs:
            yield from leaves(inputs[key], f"{path}[{key!r}]")
    elif isinstance(inputs, (list, tuple)):
        for i, each in enumerate(inputs):
            yield from leaves(each, f"{path}[{i}]")
    elif is_dataclass(inputs) and not isinstance(inputs, type):
        for field in fields(inputs):
            yield from leaves(getattr(inputs, field.name), f"{path}.{field.name}")


def rows_of(inputs: Any) -> int:
    """How many rows its tensors have; those with none (0-dim) go with every chunk as they are.

    Without a tensor, the length of its lists (of texts, say).

    Raises:
        TypeError: if there is neither.
        ValueError: if they differ in their number of rows.
    """
    sizes = {path: len(x) for path, x in leaves(inputs) if x.dim()}
    sizes = sizes or dict(_lists(inputs))
    if not sizes:
        raise TypeError(
            f"an encoder's inputs have no tensor with rows, and no list ({type(inputs).__name__}); "
            "expected tensors, or lists, tuples, mappings and dataclasses of them"
        )
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"inputs{path} has {n}" for path, n in sizes.items())
        raise ValueError(
            f"an encoder's inputs differ in their number of rows ({said}): all are cut alike. "
            "Bind what is not cut to the encoder (functools.partial), or cut yourself: chunks="
        )
    return next(iter(sizes.values()))


def _lists(inputs: Any, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(inputs, Mapping):
        for key in inputs:
            yield from _lists(inputs[key], f"{path}[{key!r}]")
    elif isinstance(inputs, tuple):
        for i, each in enumerate(inputs):
            yield from _lists(each, f"{path}[{i}]")
    elif isinstance(inputs, list):
        yield path, len(inputs)


def part_of(inputs: Any, start: int, stop: int, rows: int) -> Any:
    """The same with rows [start, stop) of every tensor, and of lists with an item for each row.

    (Not of tuples: those are sizes and the like.)
    """
    if isinstance(inputs, Tensor):
        return inputs[start:stop] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        parts = {key: part_of(inputs[key], start, stop, rows) for key in inputs}
        return _like_mapping(inputs, parts)
    if isinstance(inputs, (list, tuple)):
        if isinstance(inputs, list) and not any(True for _ in leaves(inputs)):
            return inputs[start:stop] if len(inputs) == rows else inputs
        parts_in_order = [part_of(each, start, stop, rows) for each in inputs]
        if hasattr(inputs, "_fields"):  # a named tuple
            return type(inputs)(*parts_in_order)
        return inputs if isinstance(inputs, torch.Size) else type(inputs)(parts_in_order)
    if is_dataclass(inputs) and not isinstance(inputs, type):
        like = copy.copy(inputs)  # not made anew: that would run __post_init__ on its own result
        for field in fields(inputs):
            value = part_of(getattr(inputs, field.name), start, stop, rows)
            object.__setattr__(like, field.name, value)
        return like
    return inputs


def _like_mapping(given: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """A mapping of the same class: a tokenizer's batch has methods that its encoder may call.

    Where a copy of `given` has storage of its own to write to; else a plain dictionary.
    """
    if isinstance(given, UserDict):
        like = copy.copy(given)
        like.data = parts
        return like
    if isinstance(given, dict) and type(given) is not dict and not hasattr(given, "__dict__"):
        return type(given)(parts)
    return parts


def bounds(rows: int, chunk_size: int) -> list[tuple[int, int]]:
    """[start, stop) of each chunk; one, of nothing, where there are no rows."""
    return [(i, min(i + chunk_size, rows)) for i in range(0, rows, chunk_size)] or [(0, 0)]


def devices_of(inputs: Any, modules: Iterable[torch.nn.Module]) -> set[torch.device]:
    """Where the tensors of some inputs, and the parameters and buffers of some modules, are."""
    found = {x.device for _, x in leaves(inputs)}
    for module in modules:
        found |= {x.device for x in (*module.parameters(), *module.buffers())}
    return found
