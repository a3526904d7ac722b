"""The Triton kernels in Triton's interpreter, on the CPU: every loss and primitive, by the rule.

The interpreter knows neither TF32 nor races nor reads out of bounds, and its products of bfloat16
are wrong, so that there the kernels widen their operands first: tests marked gpu see the rest.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import fastcl
from fastcl.kernels.triton import plan
from fastcl.kernels.triton.backend import GpuProducts
from tests.cases import ALL, LOSSES, PRIMITIVES, Case
from tests.functional.test_adversarial import KINDS, nasty_draws
from tests.rule import cast, check_rule, evaluate

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("chunks")]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of large embeddings, G through memory, for small ones too; test_owner.py has both."""
    monkeypatch.setattr(plan, "OWNED_DIM", {})


SLOW = pytest.mark.slow
ONE_CHUNK = {"backend": "triton"}
MANY_CHUNKS = {"backend": "triton", "workspace": 1 << 16}
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_loss_and_gradients(case: Case, dtype: torch.dtype) -> None:
    draws = [case.tensors(seed, 70, 20, scale=10.0, cone=True) for seed in range(4)]
    check_rule(case, dtype, draws, ONE_CHUNK)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_many_chunks(case: Case) -> None:
    """Some 100 x 150 pairs each: statistics are merged, accumulators taken up again."""
    draws = [case.tensors(seed, 210, 7, scale=5.0, cone=True) for seed in range(2)]
    check_rule(case, torch.float32, draws, MANY_CHUNKS)


@pytest.mark.parametrize("d", [1, pytest.param(7, marks=SLOW), pytest.param(64, marks=SLOW), 100])
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=SLOW), 33])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_ragged_sizes(case: Case, n: int, d: int) -> None:
    draws = [case.tensors(seed, n, d, scale=5.0) for seed in range(10)]
    check_rule(case, torch.float32, draws, ONE_CHUNK)


@pytest.mark.parametrize("d", [512, 768, 1152, 4096])
@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[5]], ids=str)
def test_long_rows(case: Case, d: int) -> None:
    draws = [case.tensors(seed, 17, d, scale=5.0) for seed in range(4)]
    check_rule(case, torch.float32, draws, ONE_CHUNK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_nasty_embeddings(case: Case, kind: str) -> None:
    check_rule(case, torch.float32, nasty_draws(case, KINDS[kind]), ONE_CHUNK)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=SLOW)], ids=str)
@pytest.mark.parametrize("case", ALL[::2], ids=str)
def test_similarities_of_few_blocks_by_the_library(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LONG", 1)
    draws = [case.tensors(seed, 40, 20, scale=10.0, cone=True) for seed in range(6)]
    made = mock.Mock(wraps=GpuProducts.similarity)
    monkeypatch.setattr(GpuProducts, "similarity", lambda *args: made(*args))
    check_rule(case, dtype, draws, ONE_CHUNK)
    assert made.called


@pytest.mark.parametrize("case", [c for c in PRIMITIVES if "v" in c.tensors()], ids=str)
def test_only_what_is_wanted(case: Case) -> None:
    """Frozen inputs take other routes (online rescaling, one product less), to the same numbers."""
    tensors = cast(case.tensors(n=60, d=12), torch.float32)
    for way in (ONE_CHUNK, MANY_CHUNKS):
        every = evaluate(case.ours, tensors, case.options | way)
        for frozen in (("v",), ("u",), ("u", "v")):
            some = evaluate(case.ours, tensors, case.options | way, frozen)
            for name, value in some.items():
                torch.testing.assert_close(value, every[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_same_bits_every_run(case: Case) -> None:
    tensors = cast(case.tensors(n=50, d=12), torch.float16)
    runs = [evaluate(case.ours, tensors, case.options | MANY_CHUNKS) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_float16_holds_gradients_of_any_size(case: Case) -> None:
    """G of a small incoming gradient would flush to 0; its tiles are made larger, and divided."""
    tensors = cast(case.tensors(n=40, d=20, cone=True), torch.float16)
    tensors = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in tensors.items()}
    outputs = case.ours(**tensors, **case.options, **ONE_CHUNK)
    total = sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
    of_one = _gradients(total, tensors)
    of_little = _gradients(total * 2.0**-8, tensors)
    for name, gradient in of_one.items():
        close = {"rtol": 2e-3, "atol": 2.0**-15 * float(gradient.abs().max()) + 2.0**-16}
        torch.testing.assert_close(of_little[name] * 2**8, gradient, **close, msg=name)


def _gradients(total: torch.Tensor, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    leaves = {k: x for k, x in tensors.items() if x.is_floating_point()}
    found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_a_bad_number_is_not_lost(case: Case, bad: float) -> None:
    tensors = cast(case.tensors(n=20, d=6), torch.float32)
    name = next(k for k, x in tensors.items() if x.dim() == 2)
    tensors[name][3, 2] = bad
    loss = case.ours(**tensors, **case.options, **ONE_CHUNK)
    right = case.truth(**tensors, **case.options)
    assert torch.equal(loss.isfinite(), right.isfinite())


def test_float64_goes_through_pytorch() -> None:
    u = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    run = lambda x: fastcl.clip_loss(x, x.flip(0), 3.0, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(run, u)


def test_the_interpreter_is_asked_for_by_name() -> None:
    assert fastcl.available_backends("cpu")[0] != "triton"
    assert "triton" in fastcl.available_backends("cpu")
