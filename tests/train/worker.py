"""What torchrun starts in test_distributed.py: the trainer on little data, and what befalls it.

``python -m tests.train.worker SCENARIO.json``. Evaluation and drawing, which take longest and are
tested elsewhere, are left out. Whoever but rank 0 writes below the folder of runs, dies of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.train import TrainError, new_config, resume, run, train
from fastcl.train.__main__ import app
from fastcl.train.data import DATASETS, Batch, digits
from fastcl.train.methods import Method, StepOutput
from fastcl.train.trainer import Trainer

RANK = int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Scenario:
    """What the processes do."""

    folder: str  # runs/ below it is for rank 0 alone; RANK.json in it is what a rank saw
    images: int = 256
    runs: list[dict[str, Any]] = field(default_factory=list)  # one after the other
    command: list[str] | None = None  # or the command line, once
    dies: int | None = None  # the rank that kills itself ...
    step: int = 0  # ... after so many steps ...
    where: str = "loss"  # ... before its "loss", or before its last "gradient"


def little_data(images: int) -> None:
    """So many training images; without evaluation and picture."""
    whole = digits()
    part = replace(
        whole, train_images=whole.train_images[:images], train_labels=whole.train_labels[:images]
    )
    DATASETS["digits"] = lambda: part
    run.evaluate = lambda *_: {}  # type: ignore[assignment]
    run.draw = lambda *_: None  # type: ignore[assignment]


def forbid_writing(below: Path) -> None:
    """Fail on whatever opens a file for writing, or makes or renames anything, in that folder."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        )
        if writes and str(arguments[0]).startswith(str(below)):
            raise AssertionError(f"rank {RANK} writes: {event} {arguments}")

    sys.addaudithook(hook)


def die_at(step: int, where: str) -> None:
    """Kill this process in the middle of a step."""
    train_step, embed = Trainer.train_step, Method.embed
    now = 0

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stepping(self: Trainer, batch: Batch) -> StepOutput:
        nonlocal now
        now = self.step
        if now == step and where == "gradient":  # of the first layer: the last to be known
            next(self.method.encoder.parameters()).register_hook(die)
        return train_step(self, batch)

    def embedding(self: Method, network: nn.Module, inputs: Tensor) -> Tensor:
        if now == step and where == "loss":
            die()
        return embed(self, network, inputs)

    Trainer.train_step = stepping  # type: ignore[method-assign]
    Method.embed = embedding  # type: ignore[method-assign]


def seen(given: dict[str, Any], root: Path) -> str:
    """Carry one run to its end, and say how it ended."""
    given = dict(given)
    out, refused = root / given.pop("out"), given.pop("refused_by", None)
    check = run.check_backend

    def refusing(*arguments: Any) -> None:
        check(*arguments)
        if refused == RANK:
            raise TrainError(f"not on rank {RANK}")

    run.check_backend = refusing
    try:
        if given.pop("resume", False):
            resume(out, **given)
        else:
            train(new_config(**given), out)
    except TrainError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        run.check_backend = check
    return "done"


def main() -> None:
    """Play the scenario."""
    scenario = Scenario(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    folder = Path(scenario.folder)
    little_data(scenario.images)
    if RANK != 0:
        forbid_writing(folder / "runs")
    if scenario.dies == RANK:
        die_at(scenario.step, scenario.where)
    if scenario.command is not None:
        app(scenario.command)
    ends = [seen(given, folder / "runs") for given in scenario.runs]
    (folder / f"{RANK}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
