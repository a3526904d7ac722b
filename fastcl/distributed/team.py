"""The processes of a group: who they are, and a line between them for words rather than tensors."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.errors import RankFailed, RankLost, RanksDisagree

Group = Any
"""A process group, or a device mesh of one dimension. (Builds of PyTorch may have neither.)"""

_timeout = 600.0


def set_timeout(seconds: float) -> None:
    """How long a rank waits for the others before it raises `RankLost`; 600 at first.

    Longer than the longest that ranks are ever apart (one evaluates, the others wait). For groups
    that were not used yet; the environment variable FASTCL_TIMEOUT sets it for a whole job. Data on
    NCCL waits as long as the process group's own timeout says.

    Raises:
        ValueError: unless the number is positive.

    Example:
        >>> import fastcl
        >>> fastcl.distributed.set_timeout(600)
    """
    global _timeout
    try:
        value = float(seconds)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(
            f"timeout is {seconds!r} (set_timeout, or FASTCL_TIMEOUT); expected a positive number "
            "of seconds"
        )
    _timeout = value


set_timeout(os.environ.get("FASTCL_TIMEOUT", 600.0))  # type: ignore[arg-type]

# What gloo and NCCL say, in exceptions without a type of their own, where a rank is gone or late.
_LOST = re.compile(r"gloo|nccl|time ?out|timed out|connect|broken pipe|socket|by peer", re.I)


@dataclass(frozen=True, eq=False)
class Team:
    """A process group as this process sees it.

    Words (who has how many rows, what goes wrong) go over `line`, gloo between the same ranks: they
    never wait for a GPU, and reach everyone before the first tensor is sent.
    """

    group: dist.ProcessGroup
    line: Any
    rank: int
    size: int
    timeout: timedelta
    opened: set[str]  # devices

    def wait(self, work: dist.Work, x: Tensor) -> None:
        """Waits for a transfer of x: on a CPU so long, else as long as the group's timeout says.

        (On a GPU nothing waits here but the stream.)
        """
        if x.is_cpu:
            work.wait(self.timeout)
        else:
            work.wait()

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Says in plain words what a lost connection or a timeout in there means."""
        try:
            yield
        except (RankFailed, RankLost, RanksDisagree, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size} lost the others in {what}: a rank has died, has "
                f"raised, or did not come here within {self.timeout.total_seconds():g} s (see "
                "fastcl.distributed.set_timeout). Look for the first error of all ranks; this one "
                "only follows from it. The group is of no use after it: start again, from a "
                f"checkpoint, or make another. {_first_line(error)}"
            ) from error

    def open_for(self, device: torch.device) -> None:
        """Once for a device: a first transfer of all ranks.

        NCCL opens its connections in a group's first transfer, for which all must be there; ours
        may leave out a rank without rows.
        """
        key = str(device)
        if device.type == "cpu" or key in self.opened:
            return
        with self.watched("the first transfer"):
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self.opened.add(key)

    def tell(self, words: Tensor) -> Tensor:
        """Everyone's `words` (equally long vectors on the CPU), row by row, in log2(W) rounds.

        Bruck et al. 1997: in each round a rank passes on all that it knows, so that it knows twice
        as much after it. gloo's own all-gather goes round a ring, in W rounds.
        """
        known, step = words[None], 1
        while step < self.size:
            count = min(step, self.size - step)
            new = torch.empty_like(known[:count])
            left, right = (self.rank - step) % self.size, (self.rank + step) % self.size
            sent = self.line.send([known[:count].contiguous()], left, 0)
            came = self.line.recv([new], right, 0)
            came.wait(self.timeout)
            sent.wait(self.timeout)
            known, step = torch.cat([known, new]), 2 * step
        return torch.roll(known, self.rank, dims=0)  # row 0 was this rank's


# By group, for as long as it lives: so nothing in here may hold the group itself.
_lines: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[Any, timedelta, set[str]]] = (
    weakref.WeakKeyDictionary()
)


def team_of(group: Group) -> Team:
    """The team of a process group or device mesh; every rank of it must ask."""
    group = _process_group(group)
    if group not in _lines:
        _lines[group] = _new_line(group), timedelta(0, _timeout), set()
    line, timeout, opened = _lines[group]
    return Team(group, line, dist.get_rank(group), dist.get_world_size(group), timeout, opened)


def _new_line(group: dist.ProcessGroup) -> Any:
    if not dist.is_gloo_available():
        raise RuntimeError(
            "group= needs gloo, over which ranks agree on what they compute, and this build of "
            "PyTorch is without it"
        )
    rank, size, store = dist.get_rank(group), dist.get_world_size(group), group.get_group_store()
    # Not dist.new_group, which all ranks of the job would have to call, and in the same order, as
    # its names are counted. These connections are the group's own. A store may outlive a group and
    # hold the addresses of its ranks: those of the next group get another name.
    made = f"fastcl/made/{rank}"
    name = f"fastcl/{store.add(made, 0)}"
    try:
        line = dist.ProcessGroupGloo(
            dist.PrefixStore(name, store),  # type: ignore[attr-defined]
            rank,
            size,
            _line_options(),
        )
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RankLost(
            f"group= needs every one of its ranks {ranks} in the call, and within {_timeout:g} s "
            f"not all came: {_first_line(error)}"
        ) from error
    store.add(made, 1)
    return line


def _line_options() -> Any:
    """With connections that open when they are first used: log2(W) of them, not W."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(0, _timeout)
    options._devices = [dist.ProcessGroupGloo.create_default_device(lazy_init=True)]
    return options


def _process_group(group: Group) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group= needs torch.distributed: call torch.distributed.init_process_group() first "
            "(torchrun sets what it reads), or leave group at None for one process"
        )
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a device mesh of {group.ndim} dimensions {group.mesh_dim_names or ''}; "
                'expected one: pass the dimension along which the batch is split, mesh["dp"]'
            )
        group = group.get_group()
    outside = group is dist.GroupMember.NON_GROUP_MEMBER
    if not outside and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a process group or a device mesh, not {type(group).__name__}; "
            "torch.distributed.group.WORLD is all ranks"
        )
    if outside or dist.get_rank(group) < 0:
        raise ValueError("this process is no member of group: only its members may call the loss")
    return group  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
