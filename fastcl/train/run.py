"""A run from start or resume to results: the functions behind the command line."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fastcl._version import __version__
from fastcl.distributed import RankFailed, RankLost
from fastcl.train.captions import Captions
from fastcl.train.checkpoints import load_checkpoint, write_json
from fastcl.train.config import (
    PRECISIONS,
    Config,
    Interrupted,
    ProcessLost,
    Stopped,
    TrainError,
    check_batch_size,
    check_numbers,
    merge_on_resume,
    option,
)
from fastcl.train.data import DATASETS, Batch, Dataset
from fastcl.train.display import training_progress
from fastcl.train.evaluation import Scores, encoder_split, evaluate
from fastcl.train.folder import RunFolder
from fastcl.train.methods import METHODS, build_method
from fastcl.train.plots import draw
from fastcl.train.processes import Processes, Terminated, join
from fastcl.train.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """What a finished run hands back."""

    folder: RunFolder
    config: Config
    scores: dict[str, Scores]


def new_config(**given: Any) -> Config:
    """The settings of a new run: what is given, then the method's defaults, then `Config`'s."""
    if "method" not in given:
        raise TrainError(f"--method is missing: expected one of {', '.join(METHODS)}")
    check_choices(given)
    config = Config(**{**METHODS[given["method"]].defaults, **given})
    check_numbers(config)
    return config


def check_choices(given: Mapping[str, Any]) -> None:
    """Refuse a name that is in no table; the loss itself knows which backends there are."""
    choices = {
        "method": tuple(METHODS),
        "data": tuple(DATASETS),
        "precision": PRECISIONS,
    }
    for field, known in choices.items():
        if field in given and given[field] not in known:
            raise TrainError(f"{option(field)} {given[field]}: expected one of {', '.join(known)}")


def train(config: Config, out: Path | str | None = None, console: Console | None = None) -> Outcome:
    """Start a run in a new folder and carry it to its results.

    Under torchrun every process calls it: they share each batch, and all get the outcome.
    """
    processes = join()
    material = _prepare(config, processes)
    folder = processes.by_first(
        lambda: RunFolder.create(config, None if out is None else Path(out))
    )
    return _complete(_trainer(config, material, folder, processes), console)


def resume(path: Path | str, console: Console | None = None, **given: Any) -> Outcome:
    """Continue the run in a folder; `given` may change only what `MAY_CHANGE` names."""
    folder, processes = RunFolder(Path(path)), join()
    state = processes.by_first(lambda: load_checkpoint(folder.checkpoint))
    with processes.together():
        check_choices(given)
        config = merge_on_resume(Config.from_dict(state["config"]), given, state["epoch"])
        check_choices(config.to_dict())
        check_numbers(config)
    material = _prepare(config, processes, state["tokenizer"])
    trainer = _trainer(config, material, folder, processes)
    trainer.load_state(state)
    processes.by_first(lambda: folder.write_config(config))
    return _complete(trainer, console)


Material = tuple[Dataset, Captions | None, torch.device]


def _prepare(config: Config, processes: Processes, tokenizer: str | None = None) -> Material:
    """What a run needs beside its folder, checked on every process; what one refuses, all do."""
    with processes.together():
        device = processes.device(config.device)
        dataset = DATASETS[config.data]()
        check_batch_size(config.batch_size, len(dataset.train_images), processes.size)
        worded = METHODS[config.method].captions
        captions = Captions(dataset.class_names, tokenizer) if worded else None
        check_backend(config, dataset, captions, device)
    processes.check_same({**config.to_dict(), "device": device.type})
    return dataset, captions, device


def _trainer(
    config: Config, material: Material, folder: RunFolder, processes: Processes
) -> Trainer:
    dataset, captions, device = material
    with processes.watched():
        return Trainer(config, dataset, captions, folder, device, processes)


def check_backend(
    config: Config, dataset: Dataset, captions: Captions | None, device: torch.device
) -> None:
    """Try the loss on two images, so that what cannot work fails before a run folder exists."""
    method = build_method(config, dataset, captions).to(device)
    rows = torch.arange(2)
    view = dataset.train_images[rows].to(device)
    tokens = None if captions is None else captions.table()[rows, 0].to(device)
    try:
        method(Batch((view,) * method.views, tokens, rows.to(device))).loss.backward()
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise TrainError(
            f"--backend {config.backend} with {config.precision} on {device}: {reason}"
        ) from error


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run torch, and the BLAS and OpenMP under scikit-learn, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def _complete(trainer: Trainer, console: Console | None) -> Outcome:
    processes = trainer.processes
    console = Console(quiet=True) if console is None or not processes.first else console
    try:
        with cpu_threads(trainer.config.threads), processes.watched():
            return _train_and_report(trainer, console)
    except Terminated:
        how = f"{processes} was told to stop (SIGTERM), as when another one is lost,"
        raise Stopped(f"{how} {_where_to_go_on(trainer)}") from None
    except KeyboardInterrupt:
        raise Interrupted(f"stopped by hand {_where_to_go_on(trainer)}") from None
    except (RankLost, RankFailed) as error:
        raise ProcessLost(f"{error}\nStopped {_where_to_go_on(trainer)}") from error


def _where_to_go_on(trainer: Trainer) -> str:
    command = "fastcl train"
    if not trainer.processes.alone:
        command = f"torchrun --nproc-per-node {trainer.processes.local_size} -m fastcl.train"
    return (
        f"after {trainer.epoch} of {trainer.config.epochs} epochs; the checkpoint is of epoch "
        f"{trainer.saved_epoch}. Continue from it with: "
        f"{command} --resume {shlex.quote(str(trainer.folder.path))}"
    )


def _train_and_report(trainer: Trainer, console: Console) -> Outcome:
    total = trainer.config.epochs * len(trainer.batches)
    started = time.perf_counter()
    with training_progress(console, total, trainer.step) as progress:
        trainer.fit(progress.on_step, progress.on_read)
    seconds = time.perf_counter() - started
    scores = trainer.processes.by_first(lambda: _results(trainer, console, seconds))
    return Outcome(trainer.folder, trainer.config, scores)


def _results(trainer: Trainer, console: Console, training: float) -> dict[str, Scores]:
    """Evaluate, write the results and draw the picture."""
    trained = time.perf_counter()
    with console.status("evaluating on held-out images"):
        scores = _scores(trainer)
    seconds = {"training": training, "evaluation": time.perf_counter() - trained}
    _write_results(trainer, scores, seconds)
    with console.status("drawing"):
        rows = trainer.folder.read_metrics()
        split = encoder_split(trainer.method.encoder, trainer.dataset)
        names = trainer.dataset.class_names
        draw(trainer.folder, trainer.config, rows, scores, split, names)
    return scores


def _scores(trainer: Trainer) -> dict[str, Scores]:
    untrained = build_method(trainer.config, trainer.dataset, trainer.captions)
    untrained = untrained.to(trainer.device)
    return evaluate(trainer.method, untrained, trainer.dataset, trainer.captions)


def _write_results(trainer: Trainer, scores: dict[str, Scores], seconds: dict[str, float]) -> None:
    dataset: Dataset = trainer.dataset
    write_json(
        trainer.folder.results,
        {
            "method": trainer.config.method,
            "data": dataset.name,
            "train_images": len(dataset.train_images),
            "held_out_images": len(dataset.test_images),
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "seconds": seconds,
            "accuracy": {name: asdict(each) for name, each in scores.items()},
            "device": str(trainer.device),
            "versions": {
                "fastcl": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
    )
