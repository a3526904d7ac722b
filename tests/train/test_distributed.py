"""The trainer on several processes, which torchrun starts: the losses, the folder, the ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastcl.train import new_config, resume, train
from fastcl.train.__main__ import app
from fastcl.train.captions import Captions
from fastcl.train.checkpoints import load_checkpoint
from fastcl.train.config import Config, Interrupted, TrainError, check_batch_size
from fastcl.train.data import DATASETS, Batch, Batches, Dataset
from fastcl.train.diagnostics import PairSums, cross_sums, two_view_sums
from fastcl.train.folder import RunFolder
from fastcl.train.methods import StepOutput
from fastcl.train.processes import ALONE, Processes
from fastcl.train.trainer import Trainer
from tests.train.fixtures import ALL_METHODS, ignore

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed, gloo"
)

ROOT = Path(__file__).parents[2]
LIMIT = 150  # seconds for one start of several processes, which takes 5 on idle cores

Row = dict[str, Any]


def torchrun(size: int, module: str, *words: str) -> tuple[int, str]:
    """The exit code of so many processes, and all that they and torchrun say."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launcher, "--nproc-per-node", str(size), "-m", module, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on, and kills what goes on for 30 s
        pytest.fail(f"still running after {LIMIT} s: {process.communicate(timeout=60)[0]}")
    return process.returncode, said


def play(size: int, folder: Path, **scenario: Any) -> tuple[int, str]:
    """Start worker.py with a scenario."""
    (folder / "runs").mkdir(exist_ok=True)
    path = folder / "scenario.json"
    path.write_text(json.dumps({"folder": str(folder), **scenario}))
    return torchrun(size, "tests.train.worker", str(path))


def ends(size: int, folder: Path) -> list[list[str]]:
    """What each rank saw of its runs."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> Callable[[int], None]:
    """`worker.little_data` for this process, and only for this test."""
    monkeypatch.setattr("fastcl.train.run.evaluate", lambda *_: {})
    monkeypatch.setattr("fastcl.train.run.draw", ignore)

    def cut(images: int) -> None:
        some, labels = dataset.train_images[:images], dataset.train_labels[:images]
        part = replace(dataset, train_images=some, train_labels=labels)
        monkeypatch.setitem(DATASETS, "digits", lambda: part)

    return cut


def steps(folder: Path) -> list[Row]:
    """The steps that were logged, without the clock."""
    rows = [row for row in RunFolder(folder).read_metrics() if row["event"] == "step"]
    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in rows]


# Splitting a batch changes the order of float32 additions. A step's loss and gradients then differ
# in their last places (1e-6 of losses of 2 to 12), and later steps by what Adam makes of that: up
# to the learning rate, where a gradient is all rounding. One process whose rows are in another
# order shows the same, hence the small learning rate. Over all methods, 3 seeds, and 8 steps of 2
# and of 3 processes: at most 6e-6 in a loss, 4e-6 in a similarity, 7e-3 of the norm of all
# gradients. Rows of another batch, or a wrong share of a rank, show in the first digits.
LOSS, SIMILARITY, GRADIENT = 5e-5, 5e-5, 3e-2
GENTLE = {"learning_rate": 3e-4}


def assert_close_steps(found: Path, expected: Path) -> None:
    """The same steps up to float32's rounding."""
    ours, theirs = steps(found), steps(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] != []
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=LOSS)
        for key in ("positive_similarity", "negative_similarity"):
            assert a[key] == pytest.approx(b[key], abs=SIMILARITY)
        assert a["scale"] == pytest.approx(b["scale"], rel=LOSS)
        assert a["learning_rate"] == b["learning_rate"]


def assert_close_gradients(found: Path, expected: Path) -> None:
    """Adam's running means of the gradients: unlike its steps, they show a gradient's scale."""
    a, b = gradient_means(found), gradient_means(expected)
    assert (a - b).norm() < GRADIENT * b.norm()


def gradient_means(folder: Path) -> torch.Tensor:
    """Of all parameters, one after the other."""
    of_parameters = load_checkpoint(folder / "checkpoint.pt")["optimizer"]["state"]
    return torch.cat([each["exp_avg"].flatten() for _, each in sorted(of_parameters.items())])


def assert_same_as_one(found: Path, expected: Path) -> None:
    """What a run on several processes learned is what one process learns."""
    assert_close_steps(found, expected)
    assert_close_gradients(found, expected)


def test_three_processes_share_batches_of_7_and_refuse_together(
    tmp_path: Path, little: Callable[[int], None]
) -> None:
    """They take 3, 2 and 2 of 7 images, run after run; of 2 images one would have none.

    And once more with a gradient cache, whose numbers of chunks differ between them.
    """
    usual = {"epochs": 2, "batch_size": 7, **GENTLE}
    runs = [{"method": method, "out": method, **usual} for method in ALL_METHODS]
    runs += [{**each, "out": each["out"] + "-cached", "cache_chunk": 2} for each in runs]
    refused = [
        {"method": "clip", "out": "few", "batch_size": 2},
        {"method": "clip", "out": "clip", **usual},  # rank 0 alone looks at the folder
        {"method": "clip", "out": "never", **usual, "refused_by": 1},
        {"method": "clip", "out": "lost", **usual, "learning_rate": 1e30},
    ]
    code, said = play(3, tmp_path, images=28, runs=[*runs, *refused])
    assert code == 0, said
    seen, *others = ends(3, tmp_path)
    assert others == [seen, seen]
    done, (few, taken, not_all, lost) = seen[: len(runs)], seen[len(runs) :]
    assert done == ["done"] * len(runs)
    assert "--batch-size 2 with 3 processes" in few
    assert "clip is a folder that is not empty" in taken
    assert not_all == "TrainError: not on rank 1"
    assert lost.startswith("LossLost: NaN or infinite loss at step 2")
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert made == {*(each["out"] for each in runs), "lost"}
    little(28)
    for method in ALL_METHODS:
        train(new_config(method=method, **usual), tmp_path / method)
        assert_same_as_one(tmp_path / "runs" / method, tmp_path / method)
        assert_same_as_one(tmp_path / "runs" / f"{method}-cached", tmp_path / method)


THREE_EPOCHS = {"batch_size": 32, "epochs": 3, "checkpoint_every": 1, **GENTLE}


def words(settings: dict[str, Any], out: Path) -> list[str]:
    """A command line."""
    options = [(f"--{key.replace('_', '-')}", str(value)) for key, value in settings.items()]
    return ["train", *(word for pair in options for word in pair), "--out", str(out)]


def test_two_processes_are_as_one_and_either_goes_on_where_a_rank_was_killed(
    tmp_path: Path, little: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, clip = tmp_path / "runs", {"method": "clip", **THREE_EPOCHS}
    killed = {"dies": 0, "step": 6, "where": "gradient"}  # of 12; the checkpoint is of step 4
    code, said = play(2, tmp_path, images=128, command=words(clip, runs / "killed"), **killed)
    assert code != 0
    assert "rank 1 of 2 " in said
    assert "epochs; the checkpoint is of epoch 1." in said
    assert f"-m fastcl.train --resume {runs / 'killed'}" in said
    shutil.copytree(runs / "killed", tmp_path / "by one")

    little(128)
    stopped_after(6, new_config(**clip), runs / "of one", monkeypatch)
    resumed = [{"out": "killed", "resume": True}, {"out": "of one", "resume": True}]
    whole = [{"method": method, "out": method, **THREE_EPOCHS} for method in ALL_METHODS]
    code, said = play(2, tmp_path, images=128, runs=[*resumed, *whole])
    assert (code, ends(2, tmp_path)) == (0, [["done"] * 6] * 2), said
    assert steps(runs / "killed") == steps(runs / "clip")  # two and two: bit for bit
    for method in ALL_METHODS:
        train(new_config(method=method, **THREE_EPOCHS), tmp_path / method)
        assert_same_as_one(runs / method, tmp_path / method)
    resume(tmp_path / "by one")
    assert_same_as_one(tmp_path / "by one", tmp_path / "clip")
    assert_same_as_one(runs / "of one", tmp_path / "clip")


def stopped_after(step: int, config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of this process alone, stopped by hand."""
    train_step = Trainer.train_step

    def stopping(self: Trainer, batch: Batch) -> StepOutput:
        if self.step == step:
            raise KeyboardInterrupt
        return train_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        with pytest.raises(Interrupted):
            train(config, out)


@pytest.mark.slow
def test_a_rank_is_killed_before_a_loss(tmp_path: Path) -> None:
    settings, out = {"method": "simclr", **THREE_EPOCHS}, tmp_path / "runs" / "it's"
    killed = {"dies": 2, "step": 6, "where": "loss"}
    code, said = play(3, tmp_path, images=128, command=words(settings, out), **killed)
    assert code != 0
    for survivor in (0, 1):
        assert f"rank {survivor} of 3 " in said
    assert said.count(f"-m fastcl.train --resume {shlex.quote(str(out))}") == 2
    assert load_checkpoint(out / "checkpoint.pt")["epoch"] == 1


def test_the_command_line_writes_shows_and_refuses_once(tmp_path: Path) -> None:
    options = ("--method", "infonce", "--epochs", "1", "--out", str(tmp_path / "run"))
    code, said = torchrun(2, "fastcl.train", *options)
    assert code == 0, said
    assert said.count("raw pixels") == 1
    assert said.count("run folder:") == 1
    names = {"config.json", "metrics.jsonl", "results.json", "report.png", "checkpoint.pt"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert [row["step"] for row in steps(tmp_path / "run")] == [1, 2, 3, 4]  # each step once
    code, said = torchrun(2, "fastcl.train", *options)
    assert code != 0
    assert said.count(f"error: --out {tmp_path / 'run'} is a folder that is not empty") == 1


def test_parts_of_a_batch_are_all_of_it_in_order(dataset: Dataset, captions: Captions) -> None:
    cpu = torch.device("cpu")
    batch = next(Batches(dataset, 7, views=2, captions=captions, seed=0, device=cpu).epoch())
    parts = [batch.part(rank, 3) for rank in range(3)]
    assert [len(part.ids) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)  # type: ignore
    for view in range(2):
        assert torch.equal(torch.cat([part.views[view] for part in parts]), batch.views[view])


@pytest.mark.parametrize("sums", [cross_sums, two_view_sums])
@pytest.mark.parametrize("with_ids", [False, True])
def test_sums_of_processes_give_the_similarities_of_the_whole(
    sums: Callable[..., PairSums], with_ids: bool
) -> None:
    u, v, ids = torch.randn(9, 4), torch.randn(9, 4), torch.randint(3, (9,))
    extra = (ids,) if with_ids and sums is cross_sums else ()

    def of(rows: slice) -> PairSums:
        return sums(u[rows], v[rows], *(x[rows] for x in extra), *((3,) if extra else ()))

    parts = [of(slice(0, 4)), of(slice(4, 7)), of(slice(7, 9))]
    packed = torch.stack([part.packed() for part in parts]).sum(0)
    torch.testing.assert_close(parts[0].of(9, packed).means(), of(slice(None)).means())


def test_an_image_for_each_process() -> None:
    check_batch_size(3, 100, processes=3)
    with pytest.raises(TrainError, match=r"--batch-size 3 with 4 processes.* at least 4"):
        check_batch_size(3, 100, processes=4)


def test_settings_that_differ_between_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    everyones = [{"seed": 0, "batch_size": 64}, {"seed": 0, "batch_size": 32}]
    monkeypatch.setattr(Processes, "gather", lambda *_: everyones)
    with pytest.raises(TrainError, match="--batch-size is 64 on rank 0 and 32 on rank 1"):
        Processes(rank=1, size=2).check_same(everyones[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_usage_error_is_shown_by_rank_0_alone(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = []
    monkeypatch.setattr("fastcl.train.processes.join", lambda: Processes(rank=rank, size=2))
    monkeypatch.setattr(dist, "barrier", lambda **_: waited.append(True))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        app(["train", "--nosuch"])
    assert caught.value.code == 2
    assert ("No such option" in capsys.readouterr().err) == (rank == 0)
    assert waited  # so that rank 0 has spoken when the first of them ends


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ALONE.device("cpu") == Processes(rank=1, size=2).device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    two = Processes(rank=3, size=4, local_rank=1, local_size=2)
    assert two.device("auto") == two.device("cuda") == torch.device("cuda", 1)
    assert ALONE.device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(TrainError, match=r"--device cuda:1: 2 processes .* give --device cuda"):
        two.device("cuda:1")
    with pytest.raises(TrainError, match=r"3 processes .* it has 2"):
        Processes(rank=2, size=3, local_rank=2, local_size=3).device("cuda")
