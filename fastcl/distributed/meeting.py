"""Where ranks agree that they compute the same loss, before any of them sends a tensor."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastcl.distributed.errors import RankFailed, RankLost, RanksDisagree
from fastcl.distributed.ranks import Ranks, check_options, choose_mode
from fastcl.distributed.team import Group, Team, team_of

_P = ParamSpec("_P")
_R = TypeVar("_R")
HEADER = 24  # bytes: how many rows, a digest of what is computed, whether all is well
_OWN_AFFAIR = ("group", "backend", "workspace")  # arguments in which ranks may differ
_WORDS = 128  # of 8 bytes: how much a rank says where something is wrong


def across_ranks(loss: Callable[_P, _R]) -> Callable[_P, _R]:
    """Gives a loss its `group=`: the loss finds a :class:`Meeting` there, or None as it was.

    Whatever the loss raises before its ranks have agreed is told to all of them.
    """

    signature = inspect.signature(loss)

    @functools.wraps(loss)
    def wrapped(*args: _P.args, **options: _P.kwargs) -> _R:
        given: dict[str, Any] = dict(options)
        if given.get("group") is None:
            check_options(given.get("mode", "auto"), given.get("reduce_dtype"))
            return loss(*args, **options)
        return _together(loss, signature, args, given)

    return wrapped


def _together(
    loss: Callable[..., _R], signature: inspect.Signature, args: Any, options: dict[str, Any]
) -> _R:
    if isinstance(options["group"], Meeting):  # of a loss that is made of this one
        return loss(*args, **options)
    with Meeting(options["group"], getattr(loss, "__name__", "a loss")) as meeting:
        call = signature.bind(*args, **options)
        call.apply_defaults()
        check_options(call.arguments["mode"], call.arguments["reduce_dtype"])
        meeting.arguments = {k: v for k, v in call.arguments.items() if k not in _OWN_AFFAIR}
        return loss(*args, **{**options, "group": meeting})


# A meeting talks to other processes, which no compiled graph can: torch.compile leaves it out.
# (This is what torch.compiler.disable sets, which would import the compiler to do so.)
_together._torchdynamo_disable = True  # type: ignore[attr-defined]


class Meeting:
    """One call of a loss on all ranks of a group."""

    def __init__(self, group: Group, what: str) -> None:
        self.team: Team = team_of(group)
        self.what = what
        self.arguments: dict[str, Any] = {}  # of the call
        self._met = False

    def __enter__(self) -> Meeting:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._met or not isinstance(error, Exception):
            return
        with contextlib.suppress(RankLost):  # they are gone: what is raised here says more
            self._tell(0, f"{type(error).__name__}: {error}", failed=True)

    def agree(self, embeddings: Tensor, **facts: Any) -> Ranks:
        """Compares what the ranks are about to compute; returns who has how many rows.

        The arguments of the call and `facts` must be the same everywhere; of a tensor, that it is
        one, and whether it wants a gradient.
        """
        facts = {**self.arguments, **facts}
        rows, dim, dtype = *embeddings.shape, embeddings.dtype
        mode, reduce_dtype = facts["mode"], facts["reduce_dtype"]
        counts = self.agree_on_rows(
            rows, **facts, D=dim, dtype=dtype, device=embeddings.device.type
        )
        if sum(counts) == 0:
            raise ValueError(
                f"{self.what}: the batch is empty on all {self.team.size} ranks; expected at least "
                "one row on one of them: skip the step"
            )
        self.team.open_for(embeddings.device)
        # Of what was compared alone: all ranks choose the same.
        grad = any(_wants_gradient(value) for value in facts.values())
        mode = choose_mode(mode, sum(counts), dim, self.team.size, dtype, grad)
        return Ranks(self.team, counts, mode, reduce_dtype)

    def agree_on_rows(self, rows: int, **facts: Any) -> tuple[int, ...]:
        """Who has how many rows, if what they compute is the same."""
        said = {"loss": self.what, **{name: _shown(value) for name, value in facts.items()}}
        return self._tell(rows, "\n".join(f"{k}={v}" for k, v in said.items()))

    def _tell(self, rows: int, text: str, *, failed: bool = False) -> tuple[int, ...]:
        """Everyone's number of rows, if all are well and say the same."""
        self._met = True
        team = self.team
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        header = torch.tensor([rows, int.from_bytes(digest, "big"), failed], device="cpu")
        with team.watched(self.what):
            headers = team.tell(header)
            if not headers[:, 2].any() and (headers[:, 1] == headers[0, 1]).all():
                return tuple(headers[:, 0].tolist())
            texts = [_unpacked(words) for words in team.tell(_packed(text))]
        if failed:
            return ()
        for rank, its in enumerate(headers[:, 2].tolist()):
            if its:
                raise RankFailed(f"{self.what}: rank {rank} of {team.size} raised {texts[rank]}")
        raise RanksDisagree(
            f"{self.what}: the {team.size} ranks of the group call it differently, and no loss of "
            f"the whole batch comes of that: {_differences(texts)}"
        )


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and torch.is_grad_enabled() and value.requires_grad


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor" + " with a gradient" * _wants_gradient(value)
    return str(value).removeprefix("torch.")


def _packed(text: str) -> Tensor:
    content = text.encode()[: 8 * _WORDS]
    words = torch.frombuffer(bytearray(content.ljust(8 * _WORDS, b"\0")), dtype=torch.int64)
    return words.clone()


def _unpacked(words: Tensor) -> str:
    return words.numpy().tobytes().rstrip(b"\0").decode(errors="ignore")


def _differences(texts: list[str]) -> str:
    """What differs, fact by fact, and on which ranks: "D is 64 on rank 0 and 32 on ranks 1, 2"."""
    facts = [dict(line.split("=", 1) for line in text.split("\n") if "=" in line) for text in texts]
    found = []
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        values: dict[str, list[str]] = {}
        for rank, of_rank in enumerate(facts):
            values.setdefault(of_rank.get(name, "missing"), []).append(str(rank))
        if len(values) > 1:
            where = (
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"
                for value, ranks in values.items()
            )
            found.append(f"{name} is {' and '.join(where)}")
    return "; ".join(found)
