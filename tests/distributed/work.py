"""What ranks do in the tests: importable, so that it can be sent to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.cases import Case
from tests.rule import cotangent


def sendable(case: Case) -> Case:
    """The case without its maker of tensors, which is a function that cannot be sent."""
    return replace(case, make=dict)


REPLICATED = ("temperature", "logit_scale", "logit_bias")


def is_shared(case: Case, name: str) -> bool:
    """Whether every rank has the same tensor, rather than its rows of one."""
    queue = name == "negative_keys" and case.options.get("negative_mode") != "paired"
    return queue or name in REPLICATED


def rows_of(counts: Sequence[int], rank: int) -> slice:
    """Where a rank's rows lie in the whole batch."""
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def backward_weights(case: Case, output: Tensor, total: int, rows: slice | None) -> Tensor:
    """The cotangent of the whole batch's output, or this rank's part of it."""
    if case.options.get("reduction") != "none":
        return cotangent(output)
    anchors = 2 * total if case.function == "nt_xent" else total
    whole = cotangent(output.new_empty(anchors))
    return whole if rows is None else whole.view(-1, total)[:, rows].reshape(-1)


def loss_and_gradients(
    case: Case,
    tensors: Mapping[str, Tensor],
    counts: Sequence[int],
    frozen: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """This rank's loss and gradients of its rows of the tensors of the whole batch."""
    rank, total = dist.get_rank(), sum(counts)
    rows = rows_of(counts, rank)
    leaves = {}
    for name, x in tensors.items():
        local = x if is_shared(case, name) else x[rows]
        floats = x.is_floating_point()
        leaves[name] = local.clone().requires_grad_(floats and name not in frozen)
    group = dist.group.WORLD
    output = case.ours(**leaves, **case.options, group=group, **options)
    output.backward(backward_weights(case, output, total, rows).to(output))
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None, f"{name} has no gradient on rank {rank}"
            found[name] = leaf.grad
    return found


def whole(
    case: Case, parts: Sequence[Mapping[str, Tensor]], counts: Sequence[int]
) -> dict[str, Tensor]:
    """What the ranks found as one process would have: by the convention of docs/distributed.md."""
    size, total = len(parts), sum(counts)
    none = case.options.get("reduction") == "none"
    # With "none" the sum over ranks of <cotangent, values> is what one process differentiates.
    factor = 1 if none else size
    out = {}
    for name in parts[0]:
        given = [part[name] for part in parts]
        if name == "output" and none:
            views = [x.view(-1, n) for x, n in zip(given, counts, strict=True) if n]
            out[name] = torch.cat(views, dim=1).reshape(-1)
            assert out[name].numel() in (total, 2 * total)
        elif name == "output":
            out[name] = torch.stack(given).double().mean()
        elif is_shared(case, name):
            out[name] = torch.stack(given).double().sum(dim=0) / factor
        else:
            out[name] = torch.cat(given).double() / factor
    return out


def unit_rows(n: int, d: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random unit rows that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype).requires_grad_()
