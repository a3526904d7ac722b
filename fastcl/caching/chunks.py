"""Inputs of any nesting, cut into chunks of rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass, replace
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

    Raises:
        TypeError: if there is no tensor with rows.
        ValueError: if tensors differ in their number of rows.
    """
    sizes = {path: len(x) for path, x in leaves(inputs) if x.dim()}
    if not sizes:
        raise TypeError(
            f"an encoder's inputs have no tensor with rows ({type(inputs).__name__}); expected "
            "tensors, or lists, tuples, mappings and dataclasses of them"
        )
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"inputs{path} has {n}" for path, n in sizes.items())
        raise ValueError(
            f"an encoder's inputs differ in their number of rows ({said}): all are cut alike. "
            "Bind what is not cut to the encoder (functools.partial), or pass split="
        )
    return next(iter(sizes.values()))


def part_of(inputs: Any, start: int, stop: int, rows: int) -> Any:
    """The same with rows [start, stop) of every tensor, and of lists with an item for each row."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        parts = {key: part_of(inputs[key], start, stop, rows) for key in inputs}
        return _like_mapping(inputs, parts)
    if isinstance(inputs, (list, tuple)):
        if not any(True for _ in leaves(inputs)):  # texts, ids: an item a row
            return inputs[start:stop] if len(inputs) == rows else inputs
        parts_in_order = [part_of(each, start, stop, rows) for each in inputs]
        if hasattr(inputs, "_fields"):  # a named tuple
            return type(inputs)(*parts_in_order)
        return type(inputs)(parts_in_order)
    if is_dataclass(inputs) and not isinstance(inputs, type):
        names = [field.name for field in fields(inputs) if field.init]
        cut = {name: part_of(getattr(inputs, name), start, stop, rows) for name in names}
        return replace(inputs, **cut)
    return inputs


def _like_mapping(given: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """A mapping of the same class: a tokenizer's batch has methods that its encoder may call."""
    if type(given) is dict:
        return parts
    if isinstance(given, MutableMapping):
        like = copy.copy(given)
        if getattr(like, "data", None) is getattr(given, "data", like):
            like.data = dict(given.data)  # type: ignore[attr-defined]
        for key, value in parts.items():
            like[key] = value
        return like
    return type(given)(parts)  # type: ignore[call-arg]


def bounds(rows: int, chunk_size: int) -> list[tuple[int, int]]:
    """[start, stop) of each chunk; one, of nothing, where there are no rows."""
    return [(i, min(i + chunk_size, rows)) for i in range(0, rows, chunk_size)] or [(0, 0)]


def devices_of(*things: Any) -> set[torch.device]:
    """Where the tensors of some inputs and the parameters of some modules are."""
    found = {x.device for thing in things for _, x in leaves(thing)}
    for thing in things:
        if isinstance(thing, torch.nn.Module):
            found |= {p.device for p in thing.parameters()}
            found |= {b.device for b in thing.buffers()}
    return found
