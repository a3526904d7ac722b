"""The processes of a run, as torchrun starts them: who they are, and how they agree and end.

All of them compute the same order, captions and augmentation of the whole batch; each takes its own
rows. Rank 0 alone reads and writes the run folder and speaks. Words (settings, errors, results)
go over a gloo group, tensors over NCCL where they are on CUDA.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcl.distributed import RankFailed, RankLost, RanksDisagree, sum_over_ranks
from fastcl.train.config import FailedElsewhere, Interrupted, TrainError, option, resolve_device
from fastcl.train.data import Batch
from fastcl.train.methods import Method, StepOutput

_T = TypeVar("_T")
_FROM_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# gloo has no exception of its own: what it says where another process is gone, or came too late.
_LOST = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which torchrun sends to all processes when one of them has ended."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them; by default there is only this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1
    words: Any = None  # a gloo group of them all

    @property
    def alone(self) -> bool:
        """Whether this is the only one."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this one owns the run folder."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def device(self, name: str) -> torch.device:
        """`--device`: several processes take a CUDA device each."""
        device = resolve_device(name)
        if self.alone or device.type != "cuda":
            return device
        there = torch.cuda.device_count()
        if device.index is not None or self.local_size > there:
            raise TrainError(
                f"--device {name}: {self.local_size} processes on this machine need a device each, "
                f"and it has {there}: give --device cuda and --nproc-per-node of at most {there}, "
                "or --device cpu; CUDA_VISIBLE_DEVICES chooses among devices"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def own(self, batch: Batch) -> Batch:
        """This process's rows of the whole batch."""
        return batch if self.alone else batch.part(self.rank, self.size)

    def spread(self, method: Method, device: torch.device) -> nn.Module:
        """The method over all processes: its losses take their group, its gradients their mean."""
        if self.alone:
            return method
        method.group = self.words
        if device.type == "cuda":
            given = dist.get_backend() == "nccl"
            method.group = dist.group.WORLD if given else dist.new_group(backend="nccl")
        return DistributedDataParallel(method, process_group=method.group)

    def apart(self, model: nn.Module) -> AbstractContextManager[None]:
        """In there, backward passes leave gradients on their process."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def average_gradients(self, method: Method) -> None:
        """Their mean over all processes, in one sum."""
        if self.alone:
            return
        grads = [p.grad for p in method.parameters() if p.grad is not None]
        whole = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]), method.group)
        parts = torch.split(whole / self.size, [grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises in there, all raise: none goes on to wait for it."""
        if self.alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            own = error
        told = own if own is None or isinstance(own, TrainError) else self._failure(own)
        errors = self.gather(told)
        if own is not None:
            raise own
        for failure in errors:
            if failure is not None:
                raise failure

    def _failure(self, error: Exception) -> TrainError:
        return FailedElsewhere(f"{self} failed: {type(error).__name__}: {error}")

    def by_first(self, do: Callable[[], _T]) -> _T:
        """What rank 0 returns, or raises, on all."""
        if self.alone:
            return do()
        made: list[Any] = [None]
        with self.together():
            if self.first:
                made = [do()]
        with self.watched():
            dist.broadcast_object_list(made, src=0, group=self.words)
        return made[0]  # type: ignore[no-any-return]

    def gather(self, word: _T) -> list[_T]:
        """Everyone's word, by rank."""
        if self.alone:
            return [word]
        words: list[Any] = [None] * self.size
        with self.watched():
            dist.all_gather_object(words, word, group=self.words)
        return words

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that differ: on several machines, each has a command line of its own."""
        everyones = self.gather(dict(settings))
        for name, value in everyones[0].items():
            for rank, its in enumerate(everyones):
                if its[name] != value:
                    raise TrainError(
                        f"{option(name)} is {value} on rank 0 and {its[name]} on rank {rank}: "
                        "start all processes with the same options"
                    )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Says in plain words what a lost connection means."""
        try:
            yield
        except (RankFailed, RankLost, RanksDisagree):
            raise
        except RuntimeError as error:
            if self.alone or not _says_lost(error):
                raise
            raise RankLost(
                f"{self} lost the others: one of them has died, or did not come in time. Look for "
                f"the first error of all ranks; this one only follows from it: {_line(error)}"
            ) from error


ALONE = Processes()


def whole_batches(outputs: list[StepOutput], rows: int, group: Any) -> list[StepOutput]:
    """What is logged of batches of so many rows, from what each process has of them: one sum."""
    size = dist.get_world_size(group)
    own = [torch.cat([output.loss.float().view(1), _logged(output)]) for output in outputs]
    whole = sum_over_ranks(torch.stack(own), group)
    found = []
    for output, numbers in zip(outputs, whole, strict=True):
        loss, sums = numbers[0] / size, numbers[1:]
        pairs = output.pairs
        means = tuple(sums / size) if pairs is None else pairs.of(rows, sums).means()
        found.append(StepOutput(loss, output.scale, *means))
    return found


def _logged(output: StepOutput) -> torch.Tensor:
    if output.pairs is not None:
        return output.pairs.packed()
    return torch.stack([output.positive_similarity.float(), output.negative_similarity.float()])


def _says_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _LOST)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def join() -> Processes:
    """The processes that torchrun, or the caller's own process group, has brought together.

    Joins them at the first call, until this process ends.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        launched = all(name in os.environ for name in _FROM_LAUNCHER)
        if not launched or int(os.environ["WORLD_SIZE"]) < 2:
            return ALONE
        dist.init_process_group("gloo")
        atexit.register(_part)
    if dist.get_world_size() < 2:
        return ALONE
    words = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Processes(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)), words)


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def command() -> Iterator[None]:
    """A command on each of several processes: rank 0 alone speaks, and all end when it has spoken.

    As soon as one process ends, torchrun stops the others, even one that has not said why.
    """
    processes = join()
    if processes.alone:
        yield
        return
    signal.signal(signal.SIGTERM, _terminated)
    with ExitStack() as stack:
        if not processes.first:  # a traceback still shows: it is written outside of this block
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        try:
            yield
        except SystemExit as end:
            if end.code == Interrupted.exit_code:  # Ctrl-C reaches each in another place
                end_at_once(None, Interrupted.exit_code)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with suppress(RuntimeError):  # they are gone: nothing to wait for
                dist.barrier(group=processes.words)
            raise


def _terminated(*_: object) -> NoReturn:
    raise Terminated


def end_at_once(message: str | None, code: int) -> NoReturn:
    """End this process where the others cannot be waited for, or are gone.

    Without an orderly exit: a transfer that never ends would hold it up.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if message is not None and sys.__stderr__ is not None:
        print(message, file=sys.__stderr__, flush=True)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
