"""What a run shows in the terminal: the progress bar and the table of accuracies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastcl.train.evaluation import LABELS_PER_CLASS, Score, Scores

Row = dict[str, Any]


class TrainingProgress:
    """A bar over all steps, with the numbers of the last read."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total, completed=done, numbers="starting")

    def on_step(self) -> None:
        """One step further."""
        self._progress.advance(self._task)

    def on_read(self, row: Row) -> None:
        """Show the numbers of a step."""
        self._progress.update(self._task, numbers=describe(row))


def describe(row: Row) -> str:
    """The numbers of a step, in words short enough for the bar."""
    return (
        f"loss {row['loss']:.3f}  {row['samples_per_second']:,.0f} samples/s  "
        f"scale {row['scale']:.1f}  pos {row['positive_similarity']:+.2f}  "
        f"neg {row['negative_similarity']:+.2f}"
    )


@contextmanager
def training_progress(console: Console, total: int, done: int) -> Iterator[TrainingProgress]:
    """A progress bar for the duration of a run."""
    columns = (
        BarColumn(bar_width=14),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        yield TrainingProgress(progress, total, done)


def accuracy_table(rows: dict[str, Scores], title: str) -> Table:
    """Accuracies on held-out images in per cent, with the spread over draws of labels."""
    zero_shot = any(scores.zero_shot is not None for scores in rows.values())
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("features")
    table.add_column("kNN", justify="right")
    for count in LABELS_PER_CLASS:
        table.add_column(f"{count}/class", justify="right")
    table.add_column("all", justify="right")
    if zero_shot:
        table.add_column("zero-shot", justify="right")
    for name, scores in rows.items():
        cells = [percent(scores.knn), *(percent(score) for score in scores.linear_probe.values())]
        if zero_shot:
            cells.append(percent(scores.zero_shot))
        table.add_row(name, *cells, style="bold" if name == "trained encoder" else None)
    return table


def percent(score: Score | None) -> str:
    """A score as in 81.2±3.4."""
    if score is None:
        return "-"
    spread = "" if score.std is None else f"±{100 * score.std:.1f}"
    return f"{100 * score.mean:.1f}{spread}"
