"""Small runs: everything real but the number of epochs, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.train.captions import Captions
from fastcl.train.data import Dataset, digits
from fastcl.train.folder import RunFolder
from fastcl.train.methods import METHODS
from fastcl.train.run import cpu_threads, new_config
from fastcl.train.trainer import Trainer

ALL_METHODS = ("simclr", "infonce", "clip", "siglip")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are slower on two busy cores than on one."""
    with cpu_threads(1):
        yield


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return digits()


@pytest.fixture(scope="session")
def captions(dataset: Dataset) -> Captions:
    return Captions(dataset.class_names)


@pytest.fixture(scope="session")
def small(dataset: Dataset) -> Dataset:
    """256 training images: four steps of 64 are an epoch."""
    return replace(
        dataset, train_images=dataset.train_images[:256], train_labels=dataset.train_labels[:256]
    )


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path, small: Dataset, captions: Captions) -> MakeTrainer:
    """A trainer on `small`, in a folder of its own: `make_trainer("clip", epochs=2)`."""
    made = 0

    def make(method: str, **given: Any) -> Trainer:
        nonlocal made
        made += 1
        config = new_config(method=method, **{"epochs": 2, "batch_size": 64, **given})
        folder = RunFolder.create(config, tmp_path / f"run{made}")
        words = captions if METHODS[method].captions else None
        return Trainer(config, small, words, folder, torch.device("cpu"))

    return make


def ignore(*_: Any) -> None:
    """A callback for `Trainer.fit` that shows nothing."""
