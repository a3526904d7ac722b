"""Gradients made by their owners (small embeddings), in Triton's interpreter, by the rule."""

from __future__ import annotations

import pytest
import torch

from fastcl.kernels.triton import plan
from tests.cases import ALL, LOSSES, PRIMITIVES, Case
from tests.functional.test_adversarial import KINDS, nasty_draws
from tests.rule import cast, check_rule, evaluate

pytestmark = pytest.mark.interpreter

SLOW = pytest.mark.slow
BACKEND = {"backend": "triton"}


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 lines: accumulators are taken up again, blocks past the end are empty."""
    monkeypatch.setattr(plan, "OWNED_CHUNK", 64)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_loss_and_gradients(case: Case) -> None:
    draws = [case.tensors(seed, 70, 20, scale=10.0, cone=True) for seed in range(8)]
    check_rule(case, torch.float32, draws, BACKEND)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=SLOW)], ids=str
)
@pytest.mark.parametrize("case", ALL[::2], ids=str)
def test_sixteen_bits(case: Case, dtype: torch.dtype) -> None:
    draws = [case.tensors(seed, 70, 20, scale=10.0, cone=True) for seed in range(4)]
    check_rule(case, dtype, draws, BACKEND)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("case", ALL, ids=str)
def test_several_chunks(case: Case) -> None:
    draws = [case.tensors(seed, 100, 7, scale=5.0, cone=True) for seed in range(2)]
    check_rule(case, torch.float32, draws, BACKEND)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_walks_in_parts(case: Case) -> None:
    """Few owners, many others: each of several programs meets some of them."""
    draws = [case.tensors(seed, 33, 12, scale=5.0, keys=400) for seed in range(2)]
    check_rule(case, torch.float32, draws, BACKEND)


@pytest.mark.parametrize("d", [1, pytest.param(7, marks=SLOW), 64, pytest.param(100, marks=SLOW)])
@pytest.mark.parametrize("n", [pytest.param(1, marks=SLOW), 33])
@pytest.mark.parametrize("case", LOSSES[::2], ids=str)
def test_owners_of_ragged_sizes(case: Case, n: int, d: int) -> None:
    draws = [case.tensors(seed, n, d, scale=5.0) for seed in range(10)]
    check_rule(case, torch.float16 if d > 64 else torch.float32, draws, BACKEND)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LOSSES[::5], ids=str)
def test_nasty_embeddings(case: Case, kind: str) -> None:
    check_rule(case, torch.float32, nasty_draws(case, KINDS[kind]), BACKEND)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("case", [c for c in PRIMITIVES if "v" in c.tensors()], ids=str)
def test_only_what_is_wanted(case: Case) -> None:
    tensors = cast(case.tensors(n=60, d=12), torch.float32)
    every = evaluate(case.ours, tensors, case.options | BACKEND)
    for frozen in (("v",), ("u",), ("u", "v")):
        some = evaluate(case.ours, tensors, case.options | BACKEND, frozen)
        for name, value in some.items():
            torch.testing.assert_close(value, every[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", ALL[::3], ids=str)
def test_the_same_bits_every_run(case: Case) -> None:
    tensors = cast(case.tensors(n=50, d=12), torch.float16)
    runs = [evaluate(case.ours, tensors, case.options | BACKEND) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
