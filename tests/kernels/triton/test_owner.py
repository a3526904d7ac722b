"""Gradients made by their owners (small embeddings), in Triton's interpreter, by the rule."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch

import fastcl
from benchmarks import gemms
from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Needs, Stream
from fastcl.kernels.triton import launch_owner, plan
from tests.cases import ALL, LOSSES, PRIMITIVES, Case
from tests.functional.test_adversarial import KINDS, nasty_draws
from tests.rule import cast, check_rule, evaluate

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("owners")]

SLOW = pytest.mark.slow
BACKEND = {"backend": "triton"}


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, too, where the rule sees most."""
    monkeypatch.setattr(plan, "OWNED_DIM", {2: 128, 4: 128})


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


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("parts", [2, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_walks_in_parts(case: Case, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several programs meets some of the others, the last one perhaps none."""
    monkeypatch.setattr(launch_owner, "owner_parts", lambda *args: parts)
    monkeypatch.setattr(launch_owner, "small_owner_blocks", _short_blocks)
    draws = [case.tensors(seed, 70, 12, scale=5.0) for seed in range(3)]
    check_rule(case, torch.float32, draws, BACKEND)


def _short_blocks(dim: int) -> plan.OwnerBlocks:
    return plan.OwnerBlocks(32, 32, 16, 4, 1)


def test_the_second_part_of_g_is_what_makes_few_pairs_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen in gradients before they are rounded: as the forward makes them, in float32."""
    u, v = (torch.nn.functional.normalize(torch.randn(70, 20), dim=1).half() for _ in range(2))
    stream = Stream(u, v, torch.tensor([5.0]), None, None, None, None, None, 1 << 26)
    g = torch.softmax(5 * u.double() @ v.double().T, dim=1) * 5
    right = g @ v.double()

    def error() -> float:
        weights = torch.ones(70, dtype=torch.float64)
        backend = dispatch.get("triton")
        _, made = backend.weighted_logsumexp(stream, weights, False, Needs(u=True, v=True))
        assert made.u is not None
        return float((made.u - right).abs().max() / right.abs().max())

    split = error()
    monkeypatch.setattr(plan, "SPLIT_UP_TO", 0)
    assert split < 2.0**-18
    assert 2.0**-16 < error() < 2.0**-10


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss", "info_nce", "nt_xent"])
def test_bare_products_are_those_that_the_plan_names(
    loss: str, dtype: torch.dtype, online: bool
) -> None:
    if online and loss != "info_nce":
        pytest.skip("only one direction has a way of its own where the keys are frozen")
    u, v = (torch.randn(70, 20).to(dtype).requires_grad_() for _ in range(2))
    v.requires_grad_(not online)
    arguments = {"clip_loss": (3.0,), "siglip_loss": (3.0, -1.0)}.get(loss, ())
    inputs = mock.Mock(arguments=lambda: (u, v, *arguments))
    run = functools.partial(getattr(fastcl, loss), backend="triton")
    replay = gemms.record(mock.Mock(d=20), run, "triton", inputs)
    told = fastcl.explain(loss, 70, 20, dtype=dtype, backend="triton")
    rows = 140 if loss == "nt_xent" else 70
    expected = told.products
    if online:  # statistics, the rows' similarities again, and their products with G
        expected = 2 + (2 if dtype == torch.float16 else 1)
    assert replay.flops == pytest.approx(expected * 2 * rows * rows * 20)
    assert all(x.isfinite().all() for x in replay().values())


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


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[5]], ids=str)
def test_an_infinite_last_row_is_one_row(
    case: Case, side: int, owned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks reach past the end, by owners and by chunks: what they read there is nobody's."""
    if not owned:
        monkeypatch.setattr(plan, "OWNED_DIM", {})
    tensors = cast(case.tensors(n=40, d=6), torch.float32)
    name = [k for k, x in tensors.items() if x.dim() == 2][side]
    tensors[name][-1, 2] = -torch.inf
    made, plain = (
        evaluate(case.ours, tensors, case.options | how) for how in (BACKEND, {"backend": "torch"})
    )
    for key, x in plain.items():
        torch.testing.assert_close(made[key], x, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)
