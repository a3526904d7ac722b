"""The settings of a run: one frozen record, saved with it and compared on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

PRECISIONS = ("fp32", "bf16")

# What may differ on resume. A longer run gets the schedule of its new length from here on;
# another device, backend or number of threads computes in another order: the last bits may differ.
MAY_CHANGE = frozenset(
    {"epochs", "device", "backend", "threads", "checkpoint_every", "cache_chunk"}
)


class TrainError(Exception):
    """Something the user can mend; the message says what was given, expected, and what to do."""

    exit_code = 2


class LossLost(TrainError):
    """The loss or the weights are NaN or infinite."""

    exit_code = 1


class FailedElsewhere(TrainError):
    """Another process of the run raised what is no TrainError; it shows its own traceback."""

    exit_code = 1


class ProcessLost(TrainError):
    """Another process of the run has died or failed in the middle of it."""

    exit_code = 1


class Interrupted(TrainError):
    """The user stopped the run with Ctrl-C."""

    exit_code = 130  # what shells report for SIGINT


class Stopped(Interrupted):
    """The launcher of several processes stopped this one."""

    exit_code = 143  # what shells report for SIGTERM


@dataclass(frozen=True)
class Config:
    """What a run is. Per-method defaults (such as ``temperature``) are filled by `new_config`."""

    method: str
    temperature: float
    data: str = "digits"
    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    embedding_dim: int = 64
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    backend: str = "auto"
    # One: on images this small a second thread saves a third of the time on idle cores, and costs
    # ten times as much on cores that others use. And the bits do not depend on the machine's cores.
    threads: int = 1
    checkpoint_every: int = 10
    cache_chunk: int = 0  # images that the encoders have at a time; 0: the whole batch

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON and for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; refuses fields that this version does not know."""
        known = {field.name for field in fields(cls)}
        if set(saved) != known:
            odd = ", ".join(sorted(set(saved) ^ known))
            raise TrainError(f"the saved config and this version of fastcl differ in: {odd}")
        return cls(**saved)


def option(field: str) -> str:
    """The command-line option that sets a field."""
    return "--" + field.replace("_", "-")


def check_numbers(config: Config) -> None:
    """Refuse numbers that no run can use."""
    least = {"epochs": 1, "embedding_dim": 1, "checkpoint_every": 1, "threads": 1, "seed": 0}
    for field, low in least.items():
        if getattr(config, field) < low:
            raise TrainError(
                f"{option(field)} {getattr(config, field)}: expected an integer of at least {low}"
            )
    if config.cache_chunk < 0:
        raise TrainError(
            f"--cache-chunk {config.cache_chunk}: expected a number of images, or 0 for the batch"
        )
    if config.seed >= 1 << 63:
        raise TrainError(f"--seed {config.seed}: expected an integer below 2^63")
    for field in ("learning_rate", "temperature"):
        value = getattr(config, field)
        if not 0 < value < float("inf"):
            raise TrainError(f"{option(field)} {value}: expected a positive number")
    if not 0 <= config.weight_decay < float("inf"):
        raise TrainError(f"--weight-decay {config.weight_decay}: expected a number of at least 0")


def check_batch_size(batch_size: int, train_size: int, processes: int = 1) -> None:
    """A batch needs a negative and an image for each process, and must fit the training set."""
    if not 2 <= batch_size <= train_size:
        raise TrainError(
            f"--batch-size {batch_size}: expected 2 to {train_size}, the number of training images"
        )
    if batch_size < processes:
        raise TrainError(
            f"--batch-size {batch_size} with {processes} processes, among which it is split: "
            f"expected at least {processes}; start fewer processes, or give a larger batch"
        )


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`, checked against what PyTorch sees."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise TrainError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise TrainError(
            f"--device {name}: PyTorch {torch.__version__} sees no CUDA device here; "
            "use --device cpu, or install a CUDA build of PyTorch"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise TrainError(f"--device {name}: this machine has {torch.cuda.device_count()} of them")
    return torch.device(name)


def merge_on_resume(saved: Config, given: Mapping[str, Any], epochs_done: int) -> Config:
    """The saved config with the given options that may change; refuses a clash."""
    for field, value in given.items():
        before = getattr(saved, field)
        if field not in MAY_CHANGE and value != before:
            raise TrainError(
                f"{option(field)} {value} clashes with the saved run, which has {before}: leave "
                f"the option out to continue it, or start a new run without --resume"
            )
    merged = replace(saved, **given)
    if merged.epochs < epochs_done:
        raise TrainError(
            f"--epochs {merged.epochs} is less than the {epochs_done} epochs already done; "
            f"give at least {epochs_done}, or leave the option out"
        )
    return merged
