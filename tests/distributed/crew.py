"""Processes of a gloo group that wait for work: a test sends all of them one function."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds until a test counts as hanging

# Children of a server that has imported everything start in a tenth of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "fastcl", "tests.distributed.work"])
_numbers = itertools.count()


@dataclass
class Outcome:
    """What a function came to on one rank: its result, or what it raised."""

    result: Any = None
    error: str | None = None  # "RankLost: rank 0 of 2 ..."
    trace: str = ""
    seconds: float = 0.0


def _serve(rank: int, size: int, store: str, pipe: Connection, timeout: float) -> None:
    os.environ["FASTCL_TIMEOUT"] = str(timeout)
    torch.set_num_threads(1)
    from fastcl.distributed import set_timeout

    set_timeout(timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)  # without a farewell to ranks that may be gone
        start = time.perf_counter()
        try:
            outcome = Outcome(function(*args))
        except Exception as error:
            outcome = Outcome(None, f"{type(error).__name__}: {error}", traceback.format_exc())
        outcome.seconds = time.perf_counter() - start
        pipe.send(outcome)


class Crew:
    """So many processes, from the first `run` to `dismiss`."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / f"store{next(_numbers)}")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(rank, size, store, there, timeout), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Outcome | None]:
        """What `function(*args)` came to on each rank; None of a process that has died.

        Fails the test where a rank hangs.
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        until, found = time.monotonic() + TIMEOUT, []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                self.dismiss()
                raise AssertionError(f"rank {rank} hangs in {function}{args}")
            try:
                found.append(pipe.recv())
            except (EOFError, ConnectionError):
                found.append(None)
        return found

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `function(*args)`, by rank."""
        outcomes = self.outcomes(function, *args)
        for rank, outcome in enumerate(outcomes):
            assert outcome is not None, f"rank {rank} has died"
            assert outcome.error is None, f"rank {rank}: {outcome.trace}"
        return [outcome.result for outcome in outcomes if outcome is not None]

    def dismiss(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()
