"""Mistakes that losses across ranks are known for, made on purpose: the tests must see each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.distributed import exchange, ranks, softmax, statistics, sums
from fastcl.kernels.tiles import Running
from tests.cases import LOSSES, Case
from tests.distributed import work
from tests.distributed.crew import Crew
from tests.distributed.test_losses import one_process
from tests.distributed.test_ring import Patched

CrewOf = Callable[[int], Crew]
BY_NAME = {case.name: case for case in LOSSES}


def _own_rows_only(x: Tensor, among: ranks.Ranks, factor: Tensor | None = None) -> Tensor:
    return x[among.rows_of(among.rank)] * (1 if factor is None else factor)


def _own_columns_only(self: statistics.Columns, computed: Any) -> Any:
    top, total = self._parts[self._ranks.rank].unbind(1)
    return Running(top.contiguous(), total.contiguous())


def _local_mean(self: ranks.Ranks, local_sum: Tensor, reduction: str) -> Tensor:
    own = max(1, self.counts[self.rank])
    return local_sum / own if reduction == "mean" else local_sum * self.size


def _unweighted(self: ranks.Ranks, local_sum: Tensor, reduction: str) -> Tensor:
    return local_sum / self.total if reduction == "mean" else local_sum


# What is replaced by what: a place, its name there, the mistake.
MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "gradients from other ranks are dropped": (exchange, "sum_to_owners", _own_rows_only),
    "the same where the forward makes them": (sums, "sum_to_owners", _own_rows_only),
    "columns are those of this rank's rows": (statistics.Columns, "merged", _own_columns_only),
    "labels ignore the rank": (ranks.Ranks, "offset", property(lambda self: 0)),
    "a mean of local means": (ranks.Ranks, "share", _local_mean),
    "a loss that is 1/W": (ranks.Ranks, "share", _unweighted),
    "columns' gradients are this rank's": (
        softmax,
        "Sides",
        type("Own", (), {"__init__": lambda self, *_: None, "of": lambda self, b: (None, None)}),
    ),
}
CASES = {
    "gradients from other ranks are dropped": ("clip", "gather"),
    "the same where the forward makes them": ("siglip", "gather"),
    "columns are those of this rank's rows": ("clip", "ring"),
    "labels ignore the rank": ("info_nce", "gather"),
    "a mean of local means": ("siglip", "ring"),
    "a loss that is 1/W": ("nt_xent", "ring"),
    "columns' gradients are this rank's": ("clip", "gather"),
}


def mutated(name: str | None, case: Case, *args: Any) -> dict[str, Tensor]:
    changes = [] if name is None else [MUTATIONS[name]]
    with Patched(*changes):
        return work.loss_and_gradients(case, *args)


def differs(crew: Crew, name: str | None, case: Case, mode: str) -> bool:
    """Whether loss or gradients are other than those of one process."""
    counts, tensors = (4, 3), case.tensors(n=7)
    expected = one_process(case, tensors, ())
    sent = work.sendable(case)
    parts = crew.run(mutated, name, sent, tensors, counts, (), {"mode": mode})
    found = work.whole(case, parts, counts)
    return not all(
        torch.allclose(found[x].double(), right.double(), rtol=1e-10, atol=1e-10)
        for x, right in expected.items()
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_seen(crew_of: CrewOf, name: str) -> None:
    case, mode = CASES[name]
    assert not differs(crew_of(2), None, BY_NAME[case], mode)
    assert differs(crew_of(2), name, BY_NAME[case], mode)
