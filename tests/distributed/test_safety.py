"""Whatever goes wrong on one rank ends in an error on every rank, soon, and never in a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastcl
from fastcl.compat import open_clip
from fastcl.distributed import ranks as ranks_module
from fastcl.kernels import dispatch
from tests.distributed.crew import Crew, Outcome
from tests.distributed.work import unit_rows

SHORT = 3.0  # seconds that ranks of these crews wait for each other
CrewOf = Callable[[int], Crew]


def clip(**options: Any) -> torch.Tensor:
    """A loss of this rank's rows; keyword arguments as (rank 0's, rank 1's, ...)."""
    rank = dist.get_rank()
    mine = {name: values[min(rank, len(values) - 1)] for name, values in options.items()}
    n, d = mine.pop("n", 4), mine.pop("d", 8)
    dtype, grad = mine.pop("dtype", torch.float32), mine.pop("grad", True)
    image, text = (unit_rows(n, d, seed, dtype).detach() for seed in (rank, 10 + rank))
    if mine.pop("ids", False):
        mine["ids"] = torch.arange(n)
    scale = mine.pop("scale", 10.0)
    group = dist.group.WORLD
    return fastcl.clip_loss(image.requires_grad_(grad), text, scale, group=group, **mine)


def differing(options: dict[str, Any]) -> float:
    return float(clip(**options))


def then_well(options: dict[str, Any]) -> tuple[str, float]:
    """The error of a call that goes wrong, and the loss of one after it that does not."""
    try:
        clip(**options)
    except Exception as error:
        return f"{type(error).__name__}: {error}", float(clip())
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d": (8, 6)}, "D is 8 on rank 0 and 6 on rank 1"),
        (
            {"dtype": (torch.float32, torch.bfloat16)},
            "dtype is float32 on rank 0 and bfloat16 on rank 1",
        ),
        ({"ids": (True, False)}, "ids is a tensor on rank 0 and None on rank 1"),
        ({"reduction": ("mean", "sum")}, "reduction is mean on rank 0 and sum on rank 1"),
        ({"mode": ("ring", "gather")}, "mode is ring on rank 0 and gather on rank 1"),
        (
            {"reduce_dtype": (None, torch.bfloat16)},
            "reduce_dtype is None on rank 0 and bfloat16 on rank 1",
        ),
        ({"scale": (10.0, 14.3)}, "logit_scale is 10.0 on rank 0 and 14.3 on rank 1"),
        (
            {"grad": (True, False)},
            "image_features is a tensor with a gradient on rank 0 and a tensor on rank 1",
        ),
        ({"normalize": (False, True)}, "normalize is False on rank 0 and True on rank 1"),
        ({"backend": ("reference", "torch")}, "by_reference is True on rank 0 and False on rank 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_disagreement_is_an_error_on_every_rank(
    crew_of: CrewOf, options: dict[str, Any], words: str
) -> None:
    """And the ranks are as well as before it."""
    found = crew_of(2).run(then_well, options)
    for error, _ in found:
        assert error.startswith("RanksDisagree: clip_loss: the 2 ranks")
        assert words in error
    well = crew_of(2).run(differing, {})
    assert [loss for _, loss in found] == well


def test_who_differs_is_told(crew_of: CrewOf) -> None:
    for error, _ in crew_of(4).run(then_well, {"d": (8, 6, 8, 6)}):
        assert "D is 8 on ranks 0, 2 and 6 on ranks 1, 3" in error


def other_losses() -> float:
    rank, group = dist.get_rank(), dist.group.WORLD
    loss = fastcl.nt_xent if rank else fastcl.info_nce
    return float(loss(unit_rows(3), unit_rows(3), temperature=0.5, group=group))


def test_different_losses(crew_of: CrewOf) -> None:
    for outcome in crew_of(2).outcomes(other_losses):
        assert outcome is not None
        assert "loss is info_nce on rank 0 and nt_xent on rank 1" in str(outcome.error)


def one_raises() -> None:
    group = dist.group.WORLD
    texts = unit_rows(3 if dist.get_rank() == 0 else 2)
    fastcl.clip_loss(unit_rows(3), texts, 10.0, group=group)


def test_bad_arguments_on_one_rank(crew_of: CrewOf) -> None:
    """Their rank raises what it always raises, the others what it said."""
    first, second, third = crew_of(3).outcomes(one_raises)
    assert first is not None
    assert second is not None
    assert third is not None
    own = "ValueError: image_features has 3 rows and text_features has 2"
    for outcome in (second, third):
        assert str(outcome.error).startswith(own)
    assert str(first.error).startswith(f"RankFailed: clip_loss: rank 1 of 3 raised {own}")
    assert crew_of(3).run(differing, {})


def refused_before_anything(what: str) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    u = unit_rows(3)
    if what == "mode":
        fastcl.nt_xent(u, u, group=group, mode="rnig" if rank else "ring")
    elif what == "argument":
        fastcl.nt_xent(u, u, group=group, **({"tau": 1} if rank else {}))
    else:
        open_clip.ClipLoss(rank=0, world_size=2, gather_with_grad=True)(u, u, 10.0)


@pytest.mark.parametrize("what", ["mode", "argument", "rank"])
def test_what_is_refused_before_anything_else(crew_of: CrewOf, what: str) -> None:
    """Is told to the others, too."""
    first, second = crew_of(2).outcomes(refused_before_anything, what)
    assert first is not None
    assert second is not None
    assert str(second.error).startswith(("ValueError", "TypeError"))
    assert str(first.error).startswith("RankFailed: ")
    assert str(second.error) in str(first.error)


def frozen_with_and_without_grad_mode() -> float:
    """Grad mode alone changes nothing that ranks must agree on, where nothing wants a gradient."""
    ranks_module.GATHERED_LIMIT_OF_FEW = 3 * 4 * 8  # between rows alone and rows with gradients
    u = unit_rows(2, 6).detach()
    with torch.set_grad_enabled(dist.get_rank() == 0):
        return float(fastcl.clip_loss(u, u, 10.0, group=dist.group.WORLD))


def test_the_mode_does_not_depend_on_grad_mode(own_crew: Callable[..., Crew]) -> None:
    first, second = own_crew(2, SHORT).run(frozen_with_and_without_grad_mode)
    assert first == second


def a_local_fault() -> None:
    dispatch.get("torch").logsumexp = _raise_runtime  # type: ignore[method-assign]
    clip(backend=("torch",))


def _raise_runtime(*args: Any) -> Any:
    raise RuntimeError("no room for this tile")


def test_a_fault_of_this_rank_is_not_a_lost_rank(own_crew: Callable[..., Crew]) -> None:
    for outcome in own_crew(2, SHORT).outcomes(a_local_fault):
        assert str(outcome.error) == "RuntimeError: no room for this tile"  # type: ignore[union-attr]


def all_empty() -> None:
    fastcl.clip_loss(torch.zeros(0, 4), torch.zeros(0, 4), 10.0, group=dist.group.WORLD)


def test_an_empty_batch_on_all_ranks(crew_of: CrewOf) -> None:
    for outcome in crew_of(2).outcomes(all_empty):
        assert "ValueError: clip_loss: the batch is empty on all 2 ranks" in str(outcome.error)


# ---- ranks that do not come, at every place where the others may wait for them ----


def absent(where: str) -> float:
    """Rank 1 leaves, as one does whose encoder has raised; the others are in the loss by then."""
    clip()
    raises = dist.get_rank() == 1
    if where == "loss" and raises:
        raise ValueError("no loss here")
    if where == "statistics" and raises:
        dispatch.get("torch").logsumexp = _raise  # type: ignore[method-assign]
    loss = clip(backend=("torch",), mode=("ring",), n=(16,))
    if where == "backward" and raises:
        raise ValueError("no loss here")
    loss.backward()
    return float(loss)


def _raise(*args: Any) -> Any:
    raise ValueError("no loss here")


@pytest.mark.parametrize("where", ["loss", "statistics", "backward"])
def test_a_rank_that_has_raised(own_crew: Callable[..., Crew], where: str) -> None:
    outcomes = own_crew(3, SHORT).outcomes(absent, where)
    assert "ValueError: no loss here" in str(outcomes[1].error)  # type: ignore[union-attr]
    _check_lost([outcomes[0], outcomes[2]])


def _check_lost(outcomes: list[Outcome | None]) -> None:
    for outcome in outcomes:
        assert outcome is not None
        assert str(outcome.error).startswith("RankLost: rank"), outcome.error
        assert "lost the others in" in str(outcome.error)
        assert outcome.seconds < 4 * SHORT


def killed(where: str) -> float:
    """Rank 1 dies as by the out-of-memory killer."""
    dies = dist.get_rank() == 1
    if where == "forward" and dies:
        original = dispatch.get("torch").logsumexp
        dispatch.get("torch").logsumexp = (  # type: ignore[method-assign]
            lambda *args: (os.kill(os.getpid(), signal.SIGKILL), original(*args))[1]
        )
    loss = clip(backend=("torch",), mode=("ring",), n=(16,))
    if where == "backward" and dies:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()
    return float(loss)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_is_killed(own_crew: Callable[..., Crew], where: str) -> None:
    """At once: a closed connection needs no timeout."""
    start = time.monotonic()
    outcomes = own_crew(3, 30.0).outcomes(killed, where)
    assert outcomes[1] is None
    assert time.monotonic() - start < 25
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome is not None
        assert str(outcome.error).startswith("RankLost: rank"), outcome.error


def never_together() -> None:
    if dist.get_rank() == 0:
        clip()


def test_the_first_call_of_all(own_crew: Callable[..., Crew]) -> None:
    """Already making connections needs all ranks."""
    first, second = own_crew(2, SHORT).outcomes(never_together)
    assert first is not None
    assert second is not None
    assert second.error is None
    assert str(first.error).startswith("RankLost: ")
    assert first.seconds < 4 * SHORT


# ---- what is no group ----


def test_without_torch_distributed() -> None:
    with pytest.raises(
        RuntimeError, match=r"call torch\.distributed\.init_process_group\(\) first"
    ):
        fastcl.clip_loss(unit_rows(2), unit_rows(2), 10.0, group=object())


def bad_groups() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    others = dist.new_group([2, 3])
    said = []
    for group in ("world", mesh, others if dist.get_rank() < 2 else "world"):
        try:
            fastcl.clip_loss(unit_rows(2), unit_rows(2), 10.0, group=group)
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_is_no_group(crew_of: CrewOf) -> None:
    for kind, mesh, member in crew_of(4).run(bad_groups)[:2]:
        assert kind.startswith("group must be a process group or a device mesh, not str")
        assert "device mesh of 2 dimensions ('dp', 'tp')" in mesh
        assert member.startswith("this process is no member of group")


@pytest.mark.parametrize("options", [{"mode": "circle"}, {"reduce_dtype": torch.int8}])
def test_options_that_there_are_not(options: dict[str, Any]) -> None:
    """Refused without a group, too."""
    with pytest.raises(ValueError, match="is not known; choose one of"):
        fastcl.nt_xent(unit_rows(2), unit_rows(2), **options)
    with pytest.raises(ValueError, match="is not known; choose one of"):
        fastcl.losses.NTXentLoss(**options)


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_timeouts_are_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number of seconds"):
        fastcl.distributed.set_timeout(seconds)
