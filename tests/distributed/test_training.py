"""Losses across ranks as training uses them: DDP, FSDP2, meshes, autocast, torch.compile."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from fastcl.distributed import collectives, exchange
from tests.distributed.crew import Crew
from tests.distributed.work import rows_of, unit_rows

CrewOf = Callable[[int], Crew]


class Towers(nn.Module):
    """Two small encoders with the parameters of a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
        self.text = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8))
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.bias = nn.Parameter(torch.tensor([-2.0]))
        self.double()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        image, text = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return image, text, self.log_scale.exp(), self.bias


def losses_of(kind: str, out: tuple[Tensor, ...], **options: Any) -> Tensor:
    image, text, scale, bias = out
    if kind == "siglip":
        return fastcl.siglip_loss(image, text, scale, bias, **options)
    unused = 0.0 * bias.sum()  # DDP waits for every parameter
    if kind == "clip":
        return fastcl.clip_loss(image, text, scale, **options) + unused
    loss = {"info_nce": fastcl.info_nce, "nt_xent": fastcl.nt_xent}[kind]
    return loss(image, text, temperature=1 / scale, **options) + unused


KINDS = ("clip", "siglip", "info_nce", "nt_xent")


def batch(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (6, 5)]
    return draw[0], draw[1]


def steps_alone(kind: str, counts: tuple[int, ...], steps: int) -> tuple[list[float], Tensor]:
    """Losses and last gradients of some steps of one process."""
    model, losses = Towers(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = losses_of(kind, model(*batch(sum(counts))), backend="reference")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def steps_together(
    kind: str, counts: tuple[int, ...], steps: int, wrapping: str, mode: str
) -> tuple[list[float], Tensor]:
    rows, losses = rows_of(counts, dist.get_rank()), []
    wrapped, group = _wrapped(Towers(), wrapping)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        images, texts = batch(sum(counts))
        loss = losses_of(kind, wrapped(images[rows], texts[rows]), group=group, mode=mode)
        loss.backward()
        optimizer.step()
        losses.append(float(fastcl.distributed.sum_over_ranks(loss, group)) / len(counts))
    grads = [p.grad for p in wrapped.parameters()]
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return losses, torch.cat([g.reshape(-1) for g in grads])


def _wrapped(model: nn.Module, wrapping: str) -> tuple[nn.Module, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if wrapping == "ddp":
        return DistributedDataParallel(model), dist.group.WORLD
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    fully_shard(model.image, mesh=mesh)
    fully_shard(model.text, mesh=mesh)
    return fully_shard(model, mesh=mesh), mesh["dp"]


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_are_those_of_one_process(
    crew_of: CrewOf, kind: str, wrapping: str, mode: str
) -> None:
    """Parameters, scale and bias included, over steps, with uneven batches."""
    counts = (5, 3)
    losses, gradient = steps_alone(kind, counts, steps=3)
    for found, grads in crew_of(2).run(steps_together, kind, counts, 3, wrapping, mode):
        assert found == pytest.approx(losses, rel=1e-10)
        torch.testing.assert_close(grads, gradient, rtol=1e-10, atol=1e-10)


def accumulated(counts: tuple[int, ...]) -> Tensor:
    """Two batches, one all-reduce."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Towers())
    rows = rows_of(counts, dist.get_rank())
    images, texts = (x[rows] for x in batch(sum(counts)))
    with model.no_sync():
        losses_of("clip", model(images, texts), group=dist.group.WORLD).backward()
    losses_of("siglip", model(images, texts), group=dist.group.WORLD).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_gradient_accumulation(crew_of: CrewOf) -> None:
    expected = steps_alone("clip", (4, 2), 1)[1] + steps_alone("siglip", (4, 2), 1)[1]
    for found in crew_of(2).run(accumulated, (4, 2)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- groups ----


def in_part_of_the_world() -> tuple[float, Tensor] | None:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    rank = dist.get_rank(group)
    u, v = (unit_rows(7, seed=s).detach() for s in (0, 1))
    mine = u[rows_of((4, 3), rank)].clone().requires_grad_()
    loss = fastcl.clip_loss(mine, v[rows_of((4, 3), rank)], 10.0, group=group, mode="ring")
    loss.backward()
    return float(loss), mine.grad


def test_a_group_that_is_not_the_world(crew_of: CrewOf) -> None:
    u, v = unit_rows(7, seed=0), unit_rows(7, seed=1).detach()
    loss = fastcl.clip_loss(u, v, 10.0)
    loss.backward()
    outside, *members = crew_of(3).run(in_part_of_the_world)
    assert outside is None
    assert sum(value for value, _ in members) / 2 == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, grad in members]) / 2, u.grad)


# ---- autograd ----


def twice_through_one_graph(mode: str) -> tuple[Tensor, Tensor]:
    u, v = unit_rows(4, seed=dist.get_rank()), unit_rows(4, seed=5 + dist.get_rank())
    loss = fastcl.clip_loss(u, v, 10.0, group=dist.group.WORLD, mode=mode)
    loss.backward(retain_graph=True)
    first = v.grad.clone()
    loss.backward()
    return first, v.grad


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_a_graph_that_is_kept(crew_of: CrewOf, mode: str) -> None:
    for once, twice in crew_of(3).run(twice_through_one_graph, mode):
        torch.testing.assert_close(twice, 2 * once)


def different_factors(mode: str) -> Tensor:
    """A rank may weigh its loss by itself: here rank r by r + 1."""
    rank = dist.get_rank()
    u, v = (unit_rows(6, seed=s).detach() for s in (0, 1))
    rows = rows_of((2, 3, 1), rank)
    mine = v[rows].clone().requires_grad_()
    loss = fastcl.info_nce(u[rows], mine, temperature=0.1, group=dist.group.WORLD, mode=mode)
    (loss * (rank + 1)).backward()
    return mine.grad


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_ranks_may_weigh_their_losses(crew_of: CrewOf, mode: str) -> None:
    u, v = unit_rows(6, seed=0).detach(), unit_rows(6, seed=1)
    values = fastcl.info_nce(u, v, temperature=0.1, reduction="none")
    weights = torch.tensor([1, 1, 2, 2, 2, 3], dtype=torch.float64) * 3 / 6
    (values * weights).sum().backward()
    found = torch.cat(crew_of(3).run(different_factors, mode))
    torch.testing.assert_close(found, v.grad, rtol=1e-10, atol=1e-10)


def second_derivative() -> None:
    u, v = unit_rows(3), unit_rows(3, seed=1)
    loss = fastcl.siglip_loss(u, v, 10.0, -5.0, group=dist.group.WORLD)
    torch.autograd.grad(loss, u, create_graph=True)


def test_second_derivatives_are_refused(crew_of: CrewOf) -> None:
    for outcome in crew_of(2).outcomes(second_derivative):
        assert outcome is not None
        assert "RuntimeError: fastcl's losses across ranks can be differentiated once" in str(
            outcome.error
        )


def without_gradient() -> tuple[float, bool]:
    with torch.no_grad():
        u, v = unit_rows(3), unit_rows(3, seed=1)
        loss = fastcl.info_nce(u, v, temperature=0.1, group=dist.group.WORLD)
    return float(loss), loss.requires_grad


def test_no_grad(crew_of: CrewOf) -> None:
    u, v = (torch.cat([unit_rows(3, seed=s)] * 2).detach() for s in (0, 1))
    expected = float(fastcl.info_nce(u, v, temperature=0.1))
    found = crew_of(2).run(without_gradient)
    assert all(not wanted for _, wanted in found)
    assert sum(loss for loss, _ in found) / 2 == pytest.approx(expected, rel=1e-12)


def under_autocast(kind: str, mode: str, dtype: torch.dtype) -> list[tuple[torch.dtype, float]]:
    """The loss computes as it always does; returns the same without autocast beside it."""
    rank, found = dist.get_rank(), []
    for enabled in (True, False):
        u, v = (unit_rows(4, seed=s, dtype=dtype).detach().requires_grad_() for s in (rank, 9))
        out = (u, v, torch.tensor(10.0), torch.tensor(-5.0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = losses_of(kind, out, group=dist.group.WORLD, mode=mode)
        loss.backward()
        assert v.grad.dtype == dtype
        found += [(loss.dtype, float(loss)), (v.grad.dtype, float(v.grad.double().sum()))]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(crew_of: CrewOf, kind: str, mode: str, dtype: torch.dtype) -> None:
    for within, of_grad, without, of_other in crew_of(2).run(under_autocast, kind, mode, dtype):
        assert within == without
        assert of_grad == of_other


def compiled() -> tuple[float, float]:
    """The encoder is compiled, the loss stays out of the graph."""
    model = Towers()
    images, texts = batch(4)

    def step(images: Tensor, texts: Tensor) -> Tensor:
        return losses_of("clip", model(images, texts), group=dist.group.WORLD)

    return float(torch.compile(step, backend="eager")(images, texts)), float(step(images, texts))


def test_torch_compile(crew_of: CrewOf) -> None:
    for found, expected in crew_of(2).run(compiled):
        assert found == pytest.approx(expected, rel=1e-12)


def nonfinite(mode: str) -> list[bool]:
    """One NaN on one rank: every rank's loss is NaN, as in one process."""
    u, v = unit_rows(3, seed=dist.get_rank()).detach(), unit_rows(3, seed=7).detach()
    if dist.get_rank() == 1:
        v[1, 2] = torch.nan
    return [bool(losses_of(k, (u, v, torch.tensor(5.0), torch.tensor(-2.0)), mode=mode,
                           group=dist.group.WORLD).isnan()) for k in KINDS]  # fmt: skip


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_nan_reaches_every_rank(crew_of: CrewOf, mode: str) -> None:
    assert crew_of(3).run(nonfinite, mode) == [[True] * len(KINDS)] * 3


def same_bits(mode: str) -> list[Tensor]:
    found = []
    for kind in KINDS:
        for _ in range(2):
            u = unit_rows(40, 16, dist.get_rank(), torch.float32).detach().requires_grad_()
            v = unit_rows(40, 16, 9 + dist.get_rank(), torch.float32).detach().requires_grad_()
            out = (u, v, torch.tensor(5.0), torch.tensor(-2.0))
            losses_of(kind, out, group=dist.group.WORLD, mode=mode).backward()
            found.append(torch.cat([u.grad, v.grad]))
    return found


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_the_same_bits_every_run(crew_of: CrewOf, mode: str) -> None:
    for found in crew_of(3).run(same_bits, mode):
        for first, second in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(first, second)


def modules(mode: str) -> list[float]:
    how = {"group": dist.group.WORLD, "mode": mode}
    u, v = unit_rows(3, seed=dist.get_rank()), unit_rows(3, seed=7)
    clip = fastcl.losses.ClipLoss(**how)
    return [
        float(clip(u, v, 10.0) - fastcl.clip_loss(u, v, 10.0, **how)),
        float(
            fastcl.losses.SigLipLoss(**how)(u, v, 10.0, -5.0)
            - fastcl.siglip_loss(u, v, 10.0, -5.0, **how)
        ),
        float(
            fastcl.losses.NTXentLoss(0.3, **how)(u, v)
            - fastcl.nt_xent(u, v, temperature=0.3, **how)
        ),
        float(
            fastcl.losses.InfoNCELoss(0.3, **how)(u, v)
            - fastcl.info_nce(u, v, temperature=0.3, **how)
        ),
    ]


def copied() -> tuple[float, str]:
    """A copy talks to the same group; a pickle cannot."""
    loss = fastcl.losses.ClipLoss(group=dist.group.WORLD)
    u = unit_rows(3).detach()
    same = float(copy.deepcopy(nn.Sequential(loss))[0](u, u, 10.0)) - float(loss(u, u, 10.0))
    try:
        pickle.dumps(loss)
    except TypeError as error:
        return same, str(error)
    return same, "no error"


def test_modules(crew_of: CrewOf) -> None:
    assert crew_of(2).run(modules, "ring") == [[0.0] * 4] * 2
    for same, error in crew_of(2).run(copied):
        assert same == 0.0
        assert error.startswith("ClipLoss has a group, and a process group cannot be pickled")
    again = copy.deepcopy(fastcl.losses.ClipLoss(mode="ring", reduce_dtype=torch.bfloat16))
    assert repr(again) == "ClipLoss(mode='ring', reduce_dtype=torch.bfloat16)"


def towers_held(kind: str) -> list[int]:
    """How many gathered towers are there after each of some steps, their graphs still alive."""
    found, kept = [], []
    original = collectives.gather_rows

    def gather_rows(x: Tensor, *args: Any) -> Tensor:
        out = original(x, *args)
        kept.append(weakref.ref(out))
        return out

    exchange.gather_rows = gather_rows
    for _ in range(3):
        u, v = unit_rows(5, seed=dist.get_rank()), unit_rows(5, seed=7)
        out = (u, v, torch.tensor(5.0), torch.tensor(-2.0))
        loss = losses_of(kind, out, group=dist.group.WORLD, mode="gather")
        loss.backward()  # `loss` keeps the graph, as in a training loop
        found.append(sum(ref() is not None for ref in kept))
    exchange.gather_rows = original
    return found


@pytest.mark.parametrize("kind", ["clip", "siglip", "info_nce"])
def test_a_gathered_tower_goes_with_the_backward(crew_of: CrewOf, kind: str) -> None:
    assert crew_of(2).run(towers_held, kind) == [[0, 0, 0]] * 2


def groups_come_and_go() -> list[bool]:
    """What is kept of a group goes with it; another one of the same ranks is new."""
    from fastcl.distributed import team

    alive = []
    for seed in range(2):
        group = dist.new_group([0, 1])
        u, v = unit_rows(3, seed=seed), unit_rows(3, seed=7)
        fastcl.clip_loss(u, v, 10.0, group=group).backward()
        watch = weakref.ref(group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        alive.append(watch() is not None or len(team._lines) > 1)
    return alive


def test_groups_come_and_go(own_crew: Callable[..., Crew]) -> None:
    assert own_crew(2, 30.0).run(groups_come_and_go) == [[False, False]] * 2
