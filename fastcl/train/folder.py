"""The run folder: where a run keeps its config, metrics, results, picture and checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcl.train.checkpoints import atomic_write, write_json
from fastcl.train.config import Config, TrainError


class RunFolder:
    """Paths of a run, and its log of metrics: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.picture = path / "report.png"
        self.checkpoint = path / "checkpoint.pt"

    @classmethod
    def create(cls, config: Config, out: Path | None) -> RunFolder:
        """A new folder with the config in it: `out`, or the next free name under runs/."""
        try:
            path = _next_free(config) if out is None else _claim(out)
        except OSError as error:
            raise TrainError(f"--out {out}: cannot make this folder: {error.strerror}") from error
        folder = cls(path)
        folder.write_config(config)
        return folder

    def write_config(self, config: Config) -> None:
        """The settings, readable by people; a resume takes them from the checkpoint."""
        write_json(self.config, config.to_dict())

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to the metrics and put them on disk; a number that is not finite is null."""
        lines = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a line that a crash cut short is passed over."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Drop what was logged after a step: a resumed run will log it again."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write(self.metrics, lambda file: file.write(text.encode()))


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _claim(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "a folder that is not empty" if path.is_dir() else "a file"
        run = RunFolder(path).checkpoint.exists()
        mend = f", or continue the run in it with --resume {path}" if run else ""
        raise TrainError(f"--out {path} is {what}: give a new folder{mend}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _next_free(config: Config) -> Path:
    name = f"{config.method}-{config.data}-seed{config.seed}"
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
