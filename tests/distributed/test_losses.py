"""Every loss on several ranks is the loss of one process with the whole batch, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import rule
from tests.cases import LOSSES, NORMALIZED, Case, streamed_backends
from tests.distributed.crew import Crew
from tests.distributed.work import backward_weights, loss_and_gradients, sendable, whole

# Uneven, with ranks that have no rows, an odd and an even number of ranks.
BATCHES = [(6, 6), (5, 2), (3, 0, 4), (4, 3, 5), (2, 5, 1, 3), (0, 3, 1, 0)]
CrewOf = Callable[[int], Crew]


def one_process(case: Case, tensors: dict[str, Tensor], frozen: Sequence[str]) -> dict[str, Tensor]:
    """The reference's loss and gradients of the whole batch."""
    leaves = {
        name: x.clone().requires_grad_(x.is_floating_point() and name not in frozen)
        for name, x in tensors.items()
    }
    output = case.truth(**leaves, **case.options)
    rows = next(len(x) for x in tensors.values() if x.dim() > 1)
    output.backward(backward_weights(case, output, rows, None).to(output))
    found = {"output": output.detach()}
    return found | {name: x.grad for name, x in leaves.items() if x.requires_grad}


def check(
    crew_of: CrewOf,
    case: Case,
    counts: Sequence[int],
    frozen: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> None:
    """Loss and gradients against one process, to 1e-10 in float64."""
    tensors = case.tensors(seed=seed, n=sum(counts))
    expected = one_process(case, tensors, frozen)
    crew = crew_of(len(counts))
    parts = crew.run(loss_and_gradients, sendable(case), tensors, counts, frozen, options)
    found = whole(case, parts, counts)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("counts", BATCHES, ids=str)
@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("case", [*LOSSES, *NORMALIZED], ids=str)
def test_as_one_process(crew_of: CrewOf, case: Case, mode: str, counts: tuple[int, ...]) -> None:
    check(crew_of, case, counts, mode=mode)


@pytest.mark.parametrize("backend", ["reference", *streamed_backends()])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_on_every_backend(crew_of: CrewOf, case: Case, backend: str) -> None:
    check(crew_of, case, (4, 3, 5), backend=backend)


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("tower", [0, 1])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_a_frozen_tower(crew_of: CrewOf, case: Case, tower: int, mode: str) -> None:
    name = [name for name, x in case.tensors().items() if x.dim() > 1][tower]
    check(crew_of, case, (4, 3, 5), frozen=[name], mode=mode)


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_only_the_parameters_are_learned(crew_of: CrewOf, case: Case, mode: str) -> None:
    frozen = [name for name, x in case.tensors().items() if x.dim() > 1]
    check(crew_of, case, (2, 3), frozen=frozen, mode=mode)


# ---- the float64 rule ----


# Gradients that are sent in bfloat16 are as exact as bfloat16's, whatever the embeddings are.
DTYPES = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize(("dtype", "reduce_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_the_float64_rule(
    crew_of: CrewOf, case: Case, dtype: torch.dtype, mode: str, reduce_dtype: torch.dtype | None
) -> None:
    """Across two ranks, so that dividing by their number rounds nothing."""
    counts = (17, 16)
    draws = [rule.cast(case.tensors(seed=s, n=33, d=24, scale=20.0), dtype) for s in range(4)]
    truths = [rule.truth(case, tensors) for tensors in draws]
    ours: dict[str, rule.Error] = {}
    options = {"mode": mode, "reduce_dtype": reduce_dtype}
    for tensors, right in zip(draws, truths, strict=True):
        parts = crew_of(2).run(loss_and_gradients, sendable(case), tensors, counts, (), options)
        found = whole(case, parts, counts)
        factor = rule._factor(tensors)  # of the cotangent, which the ranks leave at 1
        for name, x in found.items():
            kept = parts[0][name].dtype
            key = "output 0" if name == "output" else f"gradient of {name}"
            truth = right[key] if name == "output" else right[key] / factor
            ours.setdefault(key, rule.Error()).add(x.to(kept), truth)
    theirs = rule.measure(case.eager, case, draws, truths)
    assert not rule.violations(ours, theirs, dtype)
