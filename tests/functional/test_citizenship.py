"""Working with the rest of PyTorch: checkpointing, transforms, DDP, FSDP2, accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastcl

A, B, QUEUE = (torch.randn(n, 6, dtype=torch.float64) for n in (8, 8, 20))
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "info_nce": lambda a, b: fastcl.info_nce(a, b),
    "info_nce-queue": lambda a, b: fastcl.info_nce(a, b, QUEUE),
    "info_nce-none": lambda a, b: fastcl.info_nce(a, b, reduction="none").mean(),
    "clip": lambda a, b: fastcl.clip_loss(a, b, 3.0),
    "siglip": lambda a, b: fastcl.siglip_loss(a, b, 3.0, -2.0),
    "siglip-none": lambda a, b: fastcl.siglip_loss(a, b, 3.0, -2.0, reduction="none").mean(),
    "nt_xent": lambda a, b: fastcl.nt_xent(a, b),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def gradients(loss: Loss) -> list[Tensor]:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss(a, b).backward()
    return [a.grad, b.grad]


def check_same(given: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(given, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@every_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(loss: Loss, reentrant: bool) -> None:
    def checkpointed(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = checkpoint(loss, a, b, use_reentrant=reentrant)
        return result

    check_same(gradients(checkpointed), gradients(loss))


@every_loss
def test_backward_twice_and_outer_factors_accumulate(loss: Loss) -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    value = loss(a, b)
    (value / 3).backward(retain_graph=True)
    (value * 2 / 3).backward()
    check_same([a.grad, b.grad], gradients(loss))


@every_loss
def test_forward_mode_and_transforms_are_refused(loss: Loss) -> None:
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.jvp(lambda a: loss(a, B), (A,), (A,))
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda a: loss(a, B))(A)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda w: fastcl.similarity_weighted_logsumexp(A, B, w), torch.ones(8)),
        (lambda b: fastcl.similarity_weighted_logsumexp(A, B, col_bias=b), torch.ones(8)),
        (lambda t: fastcl.similarity_sigmoid(A, B, scale=t, bias=0.0), torch.tensor(1.0)),
        (lambda b: fastcl.similarity_sigmoid(A, B, scale=1.0, bias=b), torch.tensor(0.0)),
        (
            lambda b: fastcl.similarity_sigmoid(A, B, scale=1.0, bias=0.0, row_bias=b),
            torch.ones(8),
        ),
    ],
)
def test_forward_mode_is_refused_in_every_argument(function: Any, x: Tensor) -> None:
    """A tangent that an operator drops would read as a derivative of 0."""
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='backend="reference"'):
        function(forward_ad.make_dual(x, torch.ones_like(x)))


def test_second_derivative_through_the_weights_is_refused() -> None:
    a, w = A.clone().requires_grad_(), torch.ones(8, dtype=torch.float64, requires_grad=True)
    value = fastcl.similarity_weighted_logsumexp(a, B, w)
    (of_weights,) = torch.autograd.grad(value, w, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        of_weights.sum().backward()
    value = fastcl.similarity_weighted_logsumexp(a, B, w)
    (of_a,) = torch.autograd.grad(value, a, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(of_a.sum(), w, allow_unused=True)


@pytest.mark.parametrize("n", [1, 4])
def test_reference_has_second_derivatives_without_negatives(n: int) -> None:
    a, ids = A[:n].clone().requires_grad_(), torch.zeros(n, dtype=torch.int64)
    value = fastcl.clip_loss(a, B[:n], 3.0, ids=ids, backend="reference")
    (first,) = torch.autograd.grad(value, a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    assert (second == 0).all()


def test_ids_of_one_matrix_may_differ_by_side() -> None:
    u, rows, cols = torch.randn(50, 4), torch.randint(0, 5, (50,)), torch.randint(0, 5, (50,))
    how: dict[str, Any] = {"row_ids": rows, "col_ids": cols, "dim": "both"}
    given = fastcl.similarity_logsumexp(u, **how)
    expected = fastcl.reference.similarity_logsumexp(u, **how)
    torch.testing.assert_close(given, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_context_around_compiled_code_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcl.kernels.torch_backend import TorchBackend

    used = []
    original = TorchBackend.logsumexp

    def noted(self: TorchBackend, *args: Any) -> Any:
        used.append("torch")
        return original(self, *args)

    monkeypatch.setattr(TorchBackend, "logsumexp", noted)
    compiled = torch.compile(lambda a, b: fastcl.clip_loss(a, b, 3.0), backend="eager")
    first = compiled(A, B)
    before = len(used)
    with fastcl.use_backend("torch"):
        torch.testing.assert_close(compiled(A, B), first)
    assert len(used) == before + 1


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _trained(wrap: Callable[[torch.nn.Module], torch.nn.Module], loss: Loss) -> list[Tensor]:
    torch.manual_seed(0)
    model = wrap(torch.nn.Linear(6, 4, dtype=torch.float64))
    for _ in range(2):  # accumulation over two micro-batches
        loss(model(A), model(B)).backward()
    return [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in model.parameters()
    ]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["clip", "info_nce", "siglip", "nt_xent"])
def test_ddp_and_fsdp2_leave_gradients_as_they_are(name: str) -> None:
    loss = LOSSES[name]
    plain = _trained(lambda m: m, loss)
    check_same(_trained(DistributedDataParallel, loss), plain)
    mesh = init_device_mesh("cpu", (1,))
    check_same(_trained(lambda m: fully_shard(m, mesh=mesh), loss), plain)
