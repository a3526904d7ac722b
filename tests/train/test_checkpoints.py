"""Files in a run folder are whole or absent, and loading one runs no code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import IO

import pytest
import torch

from fastcl.train.checkpoints import atomic_write, load_checkpoint, save_checkpoint, write_json
from fastcl.train.config import TrainError
from fastcl.train.folder import RunFolder
from fastcl.train.run import new_config
from tests.train.fixtures import MakeTrainer


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, lambda file: file.write(b"old"))

    def crash(file: IO[bytes]) -> None:
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, crash)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_crash_inside_torch_save_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})

    def half(state: object, file: IO[bytes]) -> None:
        file.write(b"PK half a zip")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1


def test_content_is_on_disk_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the temporary file, then the renaming, within one folder."""
    calls: list[tuple[str, ...]] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append(("fsync",))
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        assert Path(source).read_bytes() == b"new"
        calls.append(("replace",))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert calls[:2] == [("fsync",), ("replace",)]


@pytest.mark.parametrize("method", ["simclr", "clip"])
def test_a_checkpoint_loads_with_weights_only(method: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method)
    trainer.train_step(next(trainer.batches.epoch()))
    trainer.save()
    state = torch.load(trainer.folder.checkpoint, weights_only=True)
    assert set(state) == {
        "format", "config", "epoch", "step", "method", "optimizer", "tokenizer",
        "torch_rng", "cuda_rng", "data_rng",
    }  # fmt: skip
    assert (state["tokenizer"] is not None) == (method == "clip")


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(trap),)

    torch.save({"format": 1, "epoch": Trap()}, path)
    with pytest.raises(TrainError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert trap.exists()  # the trap does work where code is executed


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_a_broken_checkpoint_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(TrainError, match="cannot be read as a checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(TrainError, match=r"no checkpoint\.pt there"):
        load_checkpoint(path)
    torch.save({"format": 999}, path)
    with pytest.raises(TrainError, match="format 999"):
        load_checkpoint(path)


def test_json_is_written_whole_and_never_with_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_metrics_take_null_for_nan_and_survive_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append([{"step": 1, "x": float("nan")}, {"step": 2, "x": 0.5}])
    folder.append([{"step": 3, "x": float("inf")}])
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "x"')
    rows = [{"step": 1, "x": None}, {"step": 2, "x": 0.5}, {"step": 3, "x": None}]
    assert folder.read_metrics() == rows
    folder.rewind(2)
    assert folder.metrics.read_text().count("\n") == 2
    assert folder.read_metrics() == rows[:2]


def test_default_folders_take_the_next_free_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = new_config(method="clip", seed=3)
    names = [str(RunFolder.create(config, None).path) for _ in range(3)]
    assert names == [f"runs/clip-digits-seed3{end}" for end in ("", "-2", "-3")]
    assert json.loads(Path("runs/clip-digits-seed3/config.json").read_text()) == config.to_dict()
