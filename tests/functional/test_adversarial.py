"""Scale 100 with embeddings made to break things: finite, and by the float64 rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cases import DTYPES, LOSSES, Case, Tensors, streamed_backends
from tests.rule import check_rule

N, D = 24, 16


def _equal(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def _opposite(x: Tensor) -> Tensor:
    signs = 1 - 2 * (torch.arange(len(x)) % 2)
    return x[:1] * signs.reshape(-1, *[1] * (x.dim() - 1))


def _one_hot(x: Tensor) -> Tensor:
    flat = torch.eye(D, dtype=x.dtype)[torch.arange(x[..., 0].numel()) % D]
    return flat.reshape(x.shape)


def _long(x: Tensor) -> Tensor:
    return 1e4 * x


KINDS = {"equal": _equal, "opposite": _opposite, "one-hot": _one_hot, "norm-1e4": _long}


def nasty_draws(case: Case, kind: Callable[[Tensor], Tensor]) -> list[Tensors]:
    """Each draw also with its second tower turned round: every positive as far away as can be.

    Both in one measurement, since where everything cancels the true gradient is 0, and what an
    error is to be compared with is a gradient made of the same terms.
    """
    draws = [case.tensors(seed, N, D, scale=100.0) for seed in range(6)]
    draws = [{k: kind(x) if x.dim() > 1 else x for k, x in t.items()} for t in draws]
    second = ("text_features", "positive_key", "z1")
    return draws + [{k: -x if k in second else x for k, x in t.items()} for t in draws]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_nasty_embeddings(case: Case, dtype: torch.dtype, kind: str) -> None:
    ways = [{"backend": backend} for backend in streamed_backends()]
    check_rule(case, dtype, nasty_draws(case, KINDS[kind]), *ways)
