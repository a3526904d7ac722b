"""An interrupted run, continued, is the run that was never interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.train.captions import Captions
from fastcl.train.checkpoints import load_checkpoint
from fastcl.train.config import Interrupted, LossLost, TrainError
from fastcl.train.data import DATASETS, Batch, Dataset
from fastcl.train.methods import StepOutput
from fastcl.train.run import new_config, resume, train
from fastcl.train.trainer import Trainer, learning_rate_factor
from tests.train.fixtures import ALL_METHODS, MakeTrainer, ignore

Row = dict[str, Any]


def timeless(rows: list[Row]) -> list[Row]:
    """Metrics without the clock."""
    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in rows]


def assert_same(a: Any, b: Any) -> None:
    """Bit-identical, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def stop_at(trainer: Trainer, step: int, error: type[BaseException]) -> None:
    """Make the trainer raise in the middle of a step."""
    forward = trainer.method.forward

    def failing(batch: Batch) -> StepOutput:
        if trainer.step == step:
            raise error
        return forward(batch)

    trainer.method.forward = failing  # type: ignore[method-assign]


def continued(trainer: Trainer, dataset: Dataset) -> Trainer:
    """A fresh trainer from the checkpoint in the folder of another, as `resume` makes it."""
    state = load_checkpoint(trainer.folder.checkpoint)
    words = state["tokenizer"]
    captions = None if words is None else Captions(dataset.class_names, words)
    again = Trainer(trainer.config, dataset, captions, trainer.folder, torch.device("cpu"))
    torch.manual_seed(12345)  # what other code draws in between must not matter
    torch.rand(7)
    again.load_state(state)
    return again


@pytest.mark.parametrize("method", ALL_METHODS)
def test_resume_is_exact(method: str, make_trainer: MakeTrainer, small: Dataset) -> None:
    whole = make_trainer(method, epochs=4, checkpoint_every=2)
    whole.fit(ignore, ignore)

    broken = make_trainer(method, epochs=4, checkpoint_every=2)
    stop_at(broken, step=15, error=KeyboardInterrupt)  # in epoch 4; the checkpoint is of epoch 2
    with pytest.raises(KeyboardInterrupt):
        broken.fit(ignore, ignore)
    assert (
        broken.folder.read_metrics()[-1]["step"] == 12
    )  # more is logged than the checkpoint knows

    again = continued(broken, small)
    assert (again.epoch, again.step) == (2, 8)
    again.fit(ignore, ignore)
    assert timeless(again.folder.read_metrics()) == timeless(whole.folder.read_metrics())
    assert_same(again.state(), whole.state())


def test_two_runs_differ_with_the_seed_only(make_trainer: MakeTrainer) -> None:
    runs = [make_trainer("simclr", epochs=1, seed=seed) for seed in (0, 0, 1)]
    logs = []
    for run in runs:
        torch.manual_seed(run.config.seed)
        run.fit(ignore, ignore)
        logs.append(timeless(run.folder.read_metrics()))
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_every_generator_matters(make_trainer: MakeTrainer, small: Dataset) -> None:
    """A resume that forgets one of them is caught by the comparison above."""
    trainer = make_trainer("clip", epochs=2, checkpoint_every=1)
    stop_at(trainer, step=4, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(ignore, ignore)
    losses = []
    for forgotten in (None, "torch", "data"):
        again = continued(trainer, small)
        if forgotten == "torch":
            torch.manual_seed(1)
        if forgotten == "data":
            again.batches.generator.manual_seed(1)
        losses.append(float(again.train_step(next(again.batches.epoch())).loss))
    assert len(set(losses)) == 3


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, small: Dataset) -> None:
    """Little data; without evaluation and drawing, which other tests cover."""
    monkeypatch.setattr("fastcl.train.run.evaluate", lambda *_: {})
    monkeypatch.setattr("fastcl.train.run.draw", ignore)
    monkeypatch.setitem(DATASETS, "digits", lambda: small)


@pytest.mark.usefixtures("quick")
def test_interrupt_says_how_to_go_on_and_resume_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new_config(method="simclr", batch_size=64, epochs=3, checkpoint_every=1)
    original = Trainer.train_step

    def interrupted(self: Trainer, batch: Batch) -> StepOutput:
        if self.step == 6:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(Interrupted, match=r"after 1 of 3 epochs.*--resume .*mine") as caught:
        train(config, tmp_path / "mine")
    assert caught.value.exit_code == 130
    assert not list((tmp_path / "mine").glob("*.tmp"))
    monkeypatch.setattr(Trainer, "train_step", original)
    outcome = resume(tmp_path / "mine")
    steps = [row["step"] for row in outcome.folder.read_metrics() if row["event"] == "step"]
    assert steps == list(range(1, 13))
    whole = train(config, tmp_path / "whole")
    assert timeless(whole.folder.read_metrics()) == timeless(outcome.folder.read_metrics())


@pytest.mark.usefixtures("quick")
def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    config = new_config(method="infonce", batch_size=64, epochs=1)
    train(config, tmp_path / "run")
    outcome = resume(tmp_path / "run", epochs=3)
    assert outcome.config.epochs == 3
    rows = [row for row in outcome.folder.read_metrics() if row["event"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    # the rest follows the schedule of the new length
    for row in rows[4:]:
        expected = config.learning_rate * learning_rate_factor(row["step"] - 1, 12)
        assert row["learning_rate"] == pytest.approx(expected)
    assert '"epochs": 3' in outcome.folder.config.read_text()
    with pytest.raises(TrainError, match="less than the 3 epochs already done"):
        resume(tmp_path / "run", epochs=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 32}, "--batch-size 32 clashes with the saved run, which has 64"),
        ({"method": "clip"}, "--method clip clashes with the saved run, which has simclr"),
        ({"seed": 1}, "--seed 1 clashes"),
        ({"precision": "bf16"}, "--precision bf16 clashes"),
        ({"learning_rate": 0.1}, "--learning-rate 0.1 clashes"),
    ],
)
def test_a_clash_is_refused_and_changes_nothing(
    given: Row, message: str, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer("simclr")
    trainer.save()
    before = {path: path.read_bytes() for path in trainer.folder.path.iterdir()}
    with pytest.raises(TrainError, match=message):
        resume(trainer.folder.path, **given)
    assert before == {path: path.read_bytes() for path in trainer.folder.path.iterdir()}


@pytest.mark.parametrize("lost", ["loss", "weights"])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    lost: str, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer("simclr", epochs=3, checkpoint_every=1)
    forward = trainer.method.forward
    # A NaN in a gradient shows in the loss one step later: after the last step, too late.
    bad = 9 if lost == "loss" else 11

    def failing(batch: Batch) -> StepOutput:
        output = forward(batch)
        if trainer.step != bad:
            return output
        if lost == "loss":
            return replace(output, loss=output.loss * torch.nan)
        output.loss.register_hook(lambda gradient: gradient * torch.nan)
        return output

    trainer.method.forward = failing  # type: ignore[method-assign]
    with pytest.raises(LossLost, match=f"NaN or infinite {lost} at step {bad + 1}, in epoch 3"):
        trainer.fit(ignore, ignore)
    state = load_checkpoint(trainer.folder.checkpoint)
    assert state["epoch"] == 2
    assert all(value.isfinite().all() for value in state["method"].values())
    logged = [row["step"] for row in trainer.folder.read_metrics() if row["event"] == "step"]
    assert logged == list(range(1, 10 if lost == "loss" else 13))
