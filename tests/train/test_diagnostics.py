"""The mean similarities against the explicit matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.train.diagnostics import cross_similarities, two_view_similarities


def unit(n: int, d: int, seed: int) -> Tensor:
    raw = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return F.normalize(raw + 0.5, dim=-1)  # shifted, so that the mean negative is far from zero


@pytest.mark.parametrize("n", [2, 3, 17, 64])
def test_cross_similarities_are_the_means_of_the_matrix(n: int) -> None:
    u, v = unit(n, 8, 0), unit(n, 8, 1)
    matrix = (u.double() @ v.double().T).float()
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    positive, negative = cross_similarities(u, v)
    torch.testing.assert_close(positive, matrix.diagonal().mean())
    torch.testing.assert_close(negative, matrix[off_diagonal].mean())


def test_pairs_with_equal_ids_are_no_negatives() -> None:
    u, v = unit(40, 8, 0), unit(40, 8, 1)
    ids = torch.randint(5, (40,), generator=torch.Generator().manual_seed(2))
    matrix = u @ v.T
    positive, negative = cross_similarities(u, v, ids, num_ids=7)  # two classes absent
    torch.testing.assert_close(positive, matrix.diagonal().mean())
    torch.testing.assert_close(negative, matrix[ids[:, None] != ids[None, :]].mean())
    assert not torch.isclose(negative, cross_similarities(u, v)[1])


@pytest.mark.parametrize("n", [2, 5, 33])
def test_two_view_negatives_are_all_but_self_and_partner(n: int) -> None:
    z0, z1 = unit(n, 6, 3), unit(n, 6, 4)
    z = torch.cat([z0, z1])
    matrix = z @ z.T
    sample = torch.arange(2 * n) % n
    positive, negative = two_view_similarities(z0, z1)
    torch.testing.assert_close(positive, (z0 * z1).sum(1).mean())
    torch.testing.assert_close(negative, matrix[sample[:, None] != sample[None, :]].mean())


def test_without_a_negative_the_mean_is_nan_and_not_a_number_made_up() -> None:
    u = unit(4, 8, 0)
    _, negative = cross_similarities(u, u, torch.zeros(4, dtype=torch.int64), num_ids=1)
    assert negative.isnan()


def test_accumulates_in_float32_and_carries_no_graph() -> None:
    u = unit(8, 8, 0).bfloat16().requires_grad_()
    for value in (*cross_similarities(u, u), *two_view_similarities(u, u)):
        assert value.dtype == torch.float32
        assert not value.requires_grad
