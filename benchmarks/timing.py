"""Timing: contenders in turn, in one process, on rotated inputs with cold caches."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from benchmarks.schema import Spread


class Clock(Protocol):
    """Measures one call on a device."""

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds that `call` took."""

    def cool(self) -> None:
        """Makes the device's caches cold."""


class CpuClock:
    """perf_counter. The rotated inputs and the contenders between them cool the caches."""

    def __call__(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result  # what it made is freed after the clock has stopped
        return seconds

    def cool(self) -> None:
        """Nothing to flush."""


class CudaClock:
    """Events on the current stream, and a buffer of twice the L2 cache written in between."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3

    def cool(self) -> None:
        """Fills L2 with other data."""
        self.flush.zero_()


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass
class Contender:
    """One way of doing a case's work: `step(i)` does it on input set i.

    `before(i)` is not timed. `failure` says why there is no time, if there is none.
    """

    name: str
    step: Callable[[int], Any]
    before: Callable[[int], None] = lambda _: None
    failure: str | None = None


def spread(seconds: Sequence[float]) -> Spread:
    """Median, quartiles and extremes."""
    if len(seconds) == 1:
        q1 = q2 = q3 = seconds[0]
    else:
        q1, q2, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(q2, q1, q3, min(seconds), max(seconds), len(seconds))


def warm_up(contenders: Sequence[Contender], sets: int, describe: Callable[[Any], str]) -> None:
    """Runs each contender on every input set; one that fails is marked and left out later."""
    for contender in contenders:
        for index in range(sets):
            if contender.failure is not None:
                break
            try:
                contender.before(index)
                contender.step(index)
            except Exception as error:  # a peer that cannot run must not end the run
                contender.failure = describe(error)


def alternate(
    contenders: Sequence[Contender], sets: int, rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, of one call, in an order drawn anew.

    All contenders of a round work on the same input set; the next round takes the next set. Drawn,
    because what comes after a contender pays for what that left behind: memory handed back, caches.
    """
    running = [c for c in contenders if c.failure is None]
    seconds: dict[str, list[float]] = {c.name: [] for c in running}
    enabled = gc.isenabled()
    try:
        for turn in range(rounds):
            gc.collect()
            gc.disable()
            index = turn % sets
            for contender in random.Random(turn).sample(running, len(running)):
                contender.before(index)
                clock.cool()
                seconds[contender.name].append(clock(partial(contender.step, index)))
    finally:
        if enabled:
            gc.enable()
    return seconds


def paired_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round: a slow minute slows both."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))
