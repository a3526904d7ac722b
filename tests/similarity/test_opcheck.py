"""torch.library.opcheck on every custom operator, with all of its test utilities."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.similarity import ops

WORKSPACE = 1 << 20
EVERY = [True] * 5
U_AND_SCALE = [True, False, True, False, False]


def rows(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def stream(kind: str, backend: str, *, grad: bool = True) -> tuple[Any, ...]:
    """The ten arguments that lead every streamed operator."""
    n, m, d = 5, 7, 3
    half = torch.bfloat16 if kind == "16-bit" else torch.float32
    u, v = rows(n, d, grad=grad, dtype=half), rows(m, d, grad=grad, dtype=half)
    scale = torch.tensor(2.0).requires_grad_(grad)
    if kind == "self":
        return u, None, scale, None, None, None, None, 0, backend, WORKSPACE
    if kind == "every":
        biases = rows(n, grad=grad), rows(m, grad=grad)
        ids = torch.arange(n), torch.arange(m) + 3
        scales = torch.rand(n).requires_grad_(grad)
        return u, v, scales, *biases, *ids, 1, backend, WORKSPACE
    return u, v, scale, None, None, None, None, None, backend, WORKSPACE


def needs(args: tuple[Any, ...]) -> list[bool]:
    return [x is not None and x.requires_grad for x in args[:5]]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        *product(("plain", "16-bit", "every"), ((True, False), (False, True), (True, True))),
        ("self", (True, False)),
    ],
)
def test_logsumexp(kind: str, lines: tuple[bool, bool], backend: str) -> None:
    torch.library.opcheck(ops.logsumexp, (*stream(kind, backend), *lines))


@pytest.mark.parametrize("add_zero", [False, True])
@pytest.mark.parametrize("kind", ["plain", "16-bit", "every"])
def test_weighted_logsumexp(kind: str, add_zero: bool, backend: str) -> None:
    args = stream(kind, backend)
    if add_zero:  # comes with minus the positive's logit as row bias, and without a diagonal
        u, v, scale, _, *others, _, name, workspace = args
        args = u, v, scale, rows(5), *others, None, name, workspace
    for weights in (None, rows(5)):
        weighted = (*args, weights, 5, add_zero, needs(args))
        torch.library.opcheck(ops.weighted_logsumexp, weighted)


@pytest.mark.parametrize("kind", ["plain", "16-bit", "every"])
def test_sigmoid_sums(kind: str, backend: str) -> None:
    args = stream(kind, backend)
    torch.library.opcheck(ops.sigmoid_sum, (*args, 5, needs(args)))
    torch.library.opcheck(ops.sigmoid_rows, args)


@pytest.mark.parametrize("shape", [(4, 3), (4, 6, 3)])
def test_pair_similarity(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = rows(4, 3, dtype=dtype), rows(*shape, dtype=dtype)
        torch.library.opcheck(ops.pair_similarity, args)


@pytest.mark.parametrize("wanted", [EVERY, U_AND_SCALE])
@pytest.mark.parametrize("kind", ["plain", "16-bit", "every"])
def test_backward_operators(kind: str, wanted: list[bool], backend: str) -> None:
    args = stream(kind, backend, grad=False)
    wanted = [w and x is not None for w, x in zip(wanted, args[:5], strict=True)]
    row_lse, col_lse, pairs, *kept = ops.logsumexp(*args, True, True)
    grads = [torch.randn_like(x) if len(x) else None for x in (row_lse, col_lse, pairs)]
    torch.library.opcheck(ops.logsumexp_backward, (*args, *kept, *grads, wanted))
    loss, pair_logits, *kept = ops.sigmoid_rows(*args)
    grads = [torch.randn_like(x) if len(x) else None for x in (loss, pair_logits)]
    torch.library.opcheck(ops.sigmoid_rows_backward, (*args, *kept, *grads, wanted))


def test_vector_operators() -> None:
    made = [rows(4, 3, grad=False), rows(4, grad=False), torch.tensor(2.0)]
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(ops.scaled, (torch.tensor(0.5), made, made, dtype))
    for keys in (rows(4, 3, grad=False), rows(4, 6, 3, grad=False)):
        args = rows(*keys.shape[:-1], grad=False), rows(4, 3, grad=False), keys
        for wanted in ([True, True], [True, False], [False, True]):
            torch.library.opcheck(ops.pair_similarity_backward, (*args, wanted))


def test_normalize(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = rows(5, 3, dtype=dtype)
        torch.library.opcheck(ops.normalize, (x, backend))
        args = rows(5, 3, grad=False, dtype=dtype), x.detach(), torch.rand(5) + 1
        torch.library.opcheck(ops.normalize_backward, (*args, backend))


def test_every_operator_is_checked_here() -> None:
    """A new operator must get its opcheck: this list is compared with what is registered."""
    checked = {"logsumexp", "logsumexp_backward", "weighted_logsumexp", "scaled", "sigmoid_sum"}
    checked |= {"sigmoid_rows", "sigmoid_rows_backward", "pair_similarity"}
    checked |= {"pair_similarity_backward", "normalize", "normalize_backward"}
    registered = {name.split("::")[1].split(".")[0] for name in _schemas()}
    assert registered == checked


def _schemas() -> list[str]:
    every = torch._C._dispatch_get_all_op_names()
    return [name for name in every if name.startswith("fastcl::")]
