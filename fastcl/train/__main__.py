"""The command line: ``fastcl train --method simclr``, or ``python -m fastcl.train``."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fastcl._version import __version__
from fastcl.distributed import RankLost
from fastcl.train import processes, run
from fastcl.train.config import PRECISIONS, Config, Interrupted, ProcessLost, Stopped, TrainError
from fastcl.train.data import DATASETS
from fastcl.train.display import accuracy_table
from fastcl.train.methods import METHODS
from fastcl.train.run import Outcome


class OnEveryProcess(TyperGroup):
    """The commands, on one process or on each of several."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Parse the command line and run what it asks for."""
        with processes.command():
            return super().main(*args, **options)


app = typer.Typer(
    cls=OnEveryProcess, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastcl {__version__}")
        raise typer.Exit


@app.callback()
def fastcl(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Contrastive losses whose memory does not grow with N x N."""


def _option(field: str, text: str) -> Any:
    default = {f.name: f.default for f in fields(Config)}[field]
    shown = "the method's" if default is MISSING else default
    return typer.Option(help=f"{text} Default: {shown}.")


@app.command("train")
def train_command(
    context: typer.Context,
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHODS)}.")] = None,
    data: Annotated[str | None, _option("data", f"One of {', '.join(DATASETS)}.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New run folder. Default: runs/METHOD-DATA-seedSEED."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder, exactly.")
    ] = None,
    epochs: Annotated[int | None, _option("epochs", "Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Images a step.")] = None,
    learning_rate: Annotated[float | None, _option("learning_rate", "At its peak.")] = None,
    weight_decay: Annotated[float | None, _option("weight_decay", "Of matrices only.")] = None,
    temperature: Annotated[
        float | None, _option("temperature", "Of the loss; clip and siglip start with it.")
    ] = None,
    embedding_dim: Annotated[int | None, _option("embedding_dim", "Seen by the loss.")] = None,
    seed: Annotated[int | None, _option("seed", "Of weights, order and augmentation.")] = None,
    device: Annotated[str | None, _option("device", "auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[
        str | None, _option("precision", f"Of the encoders: {' or '.join(PRECISIONS)}.")
    ] = None,
    backend: Annotated[
        str | None, _option("backend", "Of the loss; fastcl.available_backends() names them.")
    ] = None,
    threads: Annotated[int | None, _option("threads", "On a CPU.")] = None,
    checkpoint_every: Annotated[int | None, _option("checkpoint_every", "In epochs.")] = None,
    cache_chunk: Annotated[
        int | None, _option("cache_chunk", "Images that the encoders have at a time; 0: all.")
    ] = None,
) -> None:
    """Train an encoder, evaluate it on held-out images, and draw what happened.

    With --resume, only --epochs, --device, --backend, --threads, --checkpoint-every and
    --cache-chunk may change.
    """
    options = {name: value for name, value in context.params.items() if value is not None}
    out, folder = options.pop("out", None), options.pop("resume", None)
    console = Console()
    try:
        outcome = _train_or_resume(out, folder, options, console)
    except (ProcessLost, Stopped, RankLost) as error:  # of several processes: each survivor tells
        processes.end_at_once(f"error: {error}", getattr(error, "exit_code", 1))
    except TrainError as error:
        prefix = "" if isinstance(error, Interrupted) else "error: "
        typer.echo(prefix + str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    _report(outcome, console)


def _train_or_resume(
    out: Path | None, folder: Path | None, options: dict[str, Any], console: Console
) -> Outcome:
    with processes.join().together():
        config = run.new_config(**options) if folder is None else None
        if folder is not None and out is not None:
            raise TrainError(
                f"--out {out} clashes with --resume {folder}, which goes on in its own folder: "
                "leave one of them out"
            )
    if config is not None:
        return run.train(config, out, console)
    assert folder is not None
    return run.resume(folder, console, **options)


def _report(outcome: Outcome, console: Console) -> None:
    title = (
        f"{outcome.config.method}: accuracy on held-out images, %\n"
        "kNN, and linear probes by labels per class (± over draws)"
    )
    console.print(accuracy_table(outcome.scores, title))
    typer.echo(f"picture: {outcome.folder.picture}")
    typer.echo(f"run folder: {outcome.folder.path}")


def main() -> None:
    """`python -m fastcl.train` with the word `train`, or without it."""
    if sys.argv[1:2] not in (["train"],):
        sys.argv.insert(1, "train")
    app()


if __name__ == "__main__":
    main()
