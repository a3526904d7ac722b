"""Processes of this machine as the ranks of a gloo group: nothing is measured between machines."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.schema import without_paths


class RankError(RuntimeError):
    """A rank raised, died, or took too long. All of them are gone."""


def on_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
    """What function(rank, *args) returns on each rank, in fresh processes of one thread each.

    The function must be importable by name; arguments and results are pickled.

    Raises:
        RankError: the first error of a rank, or not all had answered after `timeout` seconds.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    answers: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                receiver, sender = context.Pipe(duplex=False)
                place = (rank, size, os.path.join(folder, "store"), timeout)
                process = context.Process(target=_rank, args=(sender, place, function, args))
                process.start()
                sender.close()
                processes.append(process)
                answers[receiver] = rank
            return _collected(answers, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(0.5)
                process.kill()
                process.join()


def said(error: Exception) -> str:
    """Why there are no figures, in one line without paths."""
    lines = str(error).strip().splitlines() or [""]
    # A rank's traceback ends with what went wrong; any other error begins with it.
    line = lines[-1] if isinstance(error, RankError) else f"{type(error).__name__}: {lines[0]}"
    return without_paths(f"failed: {line}")


def _collected(answers: dict[Connection, int], deadline: float) -> list[Any]:
    """Every rank's result, by rank."""
    results: dict[int, Any] = {}
    while len(results) < len(answers):
        open_ones = [x for x, rank in answers.items() if rank not in results]
        ready = wait(open_ones, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(answers[x] for x in open_ones)
            raise RankError(f"no answer in time from ranks {late}")
        for connection in open_ones:
            if connection in ready:
                results[answers[connection]] = _answer(connection, answers[connection])
    return [results[rank] for rank in sorted(results)]


def _answer(connection: Connection, rank: int) -> Any:
    try:
        well, result = connection.recv()
    except EOFError:
        raise RankError(f"rank {rank} died") from None
    if not well:
        raise RankError(f"rank {rank}: {result}")
    return result


def _rank(
    answer: Connection,
    place: tuple[int, int, str, float],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    rank, size, store, timeout = place
    torch.set_num_threads(1)
    # What other libraries call is deprecated; that is not what is counted here.
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn", FutureWarning)
    if sys.platform == "linux":  # the machine's name may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit
        )
        answer.send((True, function(rank, *args)))
        dist.destroy_process_group()
    except Exception:
        answer.send((False, traceback.format_exc()))
