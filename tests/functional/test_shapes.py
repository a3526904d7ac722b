"""Sizes around the edges of vectors, patches and tiles, and sizes of one."""

from __future__ import annotations

import pytest
import torch

from tests.cases import ALL, LOSSES, Case, streamed_backends
from tests.rule import check_rule, evaluate

EDGES = [(1, 1), (2, 3), (15, 1), (16, 16), (17, 7), (63, 15), (64, 17), (65, 5)]
LARGE = [(511, 9), (512, 8), (513, 7), (1025, 3)]


WAYS = [{"backend": backend} for backend in streamed_backends()]
MANY_TILES = [way | {"workspace": 1 << 16} for way in WAYS]  # tiles of some 128 x 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), EDGES)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_ragged_sizes(case: Case, n: int, d: int, dtype: torch.dtype) -> None:
    draws = [case.tensors(seed, n, d, scale=5.0) for seed in range(12)]
    check_rule(case, dtype, draws, *WAYS)


@pytest.mark.parametrize(("n", "d"), LARGE)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_many_tiles(case: Case, n: int, d: int) -> None:
    draws = [case.tensors(seed, n, d, scale=5.0, cone=True) for seed in range(4)]
    check_rule(case, torch.float32, draws, *MANY_TILES)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_tall_tile(case: Case) -> None:
    """At the default workspace, so that one tile has many blocks of rows."""
    draws = [case.tensors(seed, 600, 6, scale=5.0, cone=True) for seed in range(2)]
    check_rule(case, torch.float32, draws, *WAYS)


@pytest.mark.parametrize("dim", ["rows", "cols", "both"])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 40, 3), (40, 1, 3), (1, 1, 1), (1, 700, 1)])
def test_one_row_or_one_column(n: int, m: int, d: int, dim: str) -> None:
    case = Case("line", "similarity_logsumexp", lambda draw: {}, {"dim": dim})
    draws = [
        {"u": torch.randn(n, d), "v": torch.randn(m, d), "scale": torch.tensor(2.0)}
        for _ in range(12)
    ]
    check_rule(case, torch.float32, draws, *WAYS)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_a_single_pair_without_negatives_has_loss_zero(case: Case, backend: str) -> None:
    tensors = case.tensors(n=1, d=4)
    if "negative_keys" in tensors or case.function == "siglip_loss":
        pytest.skip("this loss has negatives beside the batch, or a term for the pair itself")
    for name, x in evaluate(case.ours, tensors, case.options | {"backend": backend}).items():
        assert torch.equal(x, torch.zeros_like(x)), name


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_duplicates(case: Case) -> None:
    draws = [case.tensors(seed, n=12, d=6, scale=20.0) for seed in range(20)]
    for tensors in draws:
        for x in tensors.values():
            if x.dim() > 1:
                x[5:9] = x[:1]
    check_rule(case, torch.float32, draws, *WAYS)
