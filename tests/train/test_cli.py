"""The command line, from the words given to the files written."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastcl
from fastcl.train.__main__ import app
from fastcl.train.config import Config

PNG = b"\x89PNG\r\n\x1a\n"
STEP_FIELDS = {
    "event": str, "step": int, "epoch": int, "loss": float, "scale": float,
    "positive_similarity": float, "negative_similarity": float, "learning_rate": float,
    "samples_per_second": float,
}  # fmt: skip
EVAL_FIELDS = {"event": str, "step": int, "epoch": int, "knn": float}


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


@pytest.fixture(scope="module", params=["simclr", "clip"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One short run of a method: its name, its result and its folder."""
    out = tmp_path_factory.mktemp("cli") / "run"
    words = ("train", "--method", request.param, "--data", "digits", "--epochs", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcl.train.plots.flatten", two_columns)
        return request.param, run(*words, "--out", str(out)), out


def two_columns(features: Any) -> Any:
    """A cheap stand-in for t-SNE, which test_plots.py tests."""
    return features[:, :2]


def test_a_run_ends_with_the_table_and_the_paths(finished: Any) -> None:
    method, result, out = finished
    assert result.exit_code == 0, result.output
    for row in ("raw pixels", "untrained encoder", "trained encoder"):
        assert row in result.stdout
    assert ("zero-shot" in result.stdout) == (method == "clip")
    assert result.stdout.rstrip().splitlines()[-2:] == [
        f"picture: {out / 'report.png'}",
        f"run folder: {out}",
    ]


def test_the_run_folder_is_complete(finished: Any) -> None:
    _, _, out = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "results.json", "report.png", "checkpoint.pt"
    }  # fmt: skip
    assert (out / "report.png").read_bytes().startswith(PNG)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 2


def test_metrics_have_the_documented_fields(finished: Any) -> None:
    _, _, out = finished
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["event"] for row in rows} == {"step", "eval"}
    for row in rows:
        fields = STEP_FIELDS if row["event"] == "step" else EVAL_FIELDS
        assert {key: type(value) for key, value in row.items()} == fields
    steps = [row["step"] for row in rows if row["event"] == "step"]
    assert steps == list(range(1, 9))
    assert [row["epoch"] for row in rows if row["event"] == "eval"] == [1, 2]


def test_results_are_accuracies_of_the_three_rows(finished: Any) -> None:
    method, _, out = finished
    results = json.loads((out / "results.json").read_text())
    assert results["method"] == method
    assert (results["steps"], results["held_out_images"]) == (8, 640)
    assert list(results["accuracy"]) == ["raw pixels", "untrained encoder", "trained encoder"]
    for name, row in results["accuracy"].items():
        assert set(row["linear_probe"]) == {"1", "5", "10", "all"}
        scores = [row["knn"], *row["linear_probe"].values()]
        if method == "clip" and name != "raw pixels":
            scores.append(row["zero_shot"])
        else:
            assert row["zero_shot"] is None
        assert all(0 <= score["mean"] <= 1 for score in scores)
        assert row["linear_probe"]["1"]["std"] > 0


def test_a_used_folder_is_refused_and_resume_is_offered(finished: Any) -> None:
    method, _, out = finished
    result = run("train", "--method", method, "--out", str(out))
    assert_refused(result, "not empty", f"--resume {out}")


@pytest.mark.parametrize("finished", ["clip"], indirect=True)
def test_resume_of_a_finished_run_gives_the_same_results(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, out = finished
    monkeypatch.setattr("fastcl.train.plots.flatten", two_columns)
    before = json.loads((out / "results.json").read_text())
    result = run("train", "--resume", str(out))
    assert result.exit_code == 0, result.output
    assert json.loads((out / "results.json").read_text())["accuracy"] == before["accuracy"]


def test_resume_refuses_a_clash_and_a_second_folder(finished: Any) -> None:
    _, _, out = finished
    assert_refused(run("train", "--resume", str(out), "--batch-size", "32"), "32", "has 256")
    assert_refused(run("train", "--resume", str(out), "--out", "x"), "--out x clashes")


def assert_refused(result: Any, *parts: str) -> None:
    """One line, a failing status, no traceback."""
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--method is missing", "simclr, infonce, clip, siglip"]),
        (["--method", "byol"], ["--method byol", "simclr, infonce, clip, siglip"]),
        (["--method", "clip", "--data", "mnist"], ["--data mnist", "digits"]),
        (["--method", "clip", "--batch-size", "1"], ["--batch-size 1", "2 to 1157"]),
        (["--method", "clip", "--batch-size", "1158"], ["--batch-size 1158", "2 to 1157"]),
        (["--method", "clip", "--backend", "abacus"], ["--backend abacus", "reference"]),
        (["--method", "clip", "--precision", "fp8"], ["--precision fp8", "fp32, bf16"]),
        (["--method", "clip", "--device", "tpu"], ["--device tpu", "auto, cpu, cuda"]),
        (["--method", "clip", "--device", "cuda:x"], ["--device cuda:x", "auto, cpu, cuda"]),
        (["--method", "clip", "--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--method", "clip", "--seed", "-1"], ["--seed -1", "at least 0"]),
        (["--method", "clip", "--seed", str(1 << 63)], ["--seed 9223372036854775808", "2^63"]),
        (["--method", "clip", "--threads", "0"], ["--threads 0", "at least 1"]),
        (["--method", "clip", "--temperature", "0"], ["--temperature 0.0", "positive"]),
        (["--method", "clip", "--learning-rate", "nan"], ["--learning-rate nan", "positive"]),
        (["--method", "clip", "--weight-decay", "-1"], ["--weight-decay -1.0", "at least 0"]),
        (["--resume", "nowhere"], ["--resume nowhere", "no checkpoint.pt"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    words: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run("train", *words), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(tmp_path: Path) -> None:
    result = run("train", "--method", "clip", "--device", "cuda", "--out", str(tmp_path / "x"))
    assert_refused(result, "sees no CUDA device", "--device cpu")
    assert not (tmp_path / "x").exists()


def test_out_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert_refused(run("train", "--method", "clip", "--out", str(file)), "is a file")
    assert_refused(
        run("train", "--method", "clip", "--out", str(file / "x")), "cannot make this folder"
    )
    assert file.read_text() == "mine"


@pytest.mark.parametrize("words", [["train"], []])
def test_the_module_runs_with_and_without_the_word_train(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("fastcl.train.__main__").main
    monkeypatch.setattr(sys, "argv", ["fastcl.train", *words, "--method", "nosuch"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "--method nosuch: expected one of" in capsys.readouterr().err


def test_without_the_extra_the_import_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec

    def without_kornia(name: str, *rest: Any) -> Any:
        return None if name == "kornia" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_kornia)
    monkeypatch.delitem(sys.modules, "fastcl.train")
    with pytest.raises(ImportError, match=r"needs kornia, not .* pip install '\.\[train\]'"):
        importlib.import_module("fastcl.train")


def command_without(module: str) -> Any:
    """As a new process, which has imported nothing of it yet."""
    code = f"import sys; sys.modules['{module}'] = None; from fastcl.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["typer", "threadpoolctl"])
def test_without_the_extra_the_command_says_so_in_one_line(module: str) -> None:
    done = command_without(module)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(f"error: fastcl.train needs {module}, not installed")


def test_another_missing_module_is_a_bug_with_its_traceback() -> None:
    done = command_without("fastcl.train.config")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "fastcl.train.config" in done.stderr.strip().splitlines()[-1]


def test_the_extra_is_pyprojects() -> None:
    from fastcl.__main__ import EXTRA

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^train = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    names = {name.replace("scikit-learn", "sklearn") for name in re.findall(r'"([\w-]+)>', listed)}
    assert set(EXTRA) == names
    assert importlib.import_module("fastcl.train")._NEEDS == EXTRA


def test_version() -> None:
    assert run("--version").output.strip() == f"fastcl {fastcl.__version__}"


def test_help_shows_the_defaults() -> None:
    shown = " ".join(run("train", "--help").output.replace("│", " ").split())
    assert f"Default: {Config.batch_size}." in shown
    assert "One of digits. Default: digits." in shown


def test_the_library_does_not_import_the_trainer() -> None:
    """Nobody who wants a loss pays for plots."""
    code = (
        "import sys, fastcl; "
        "print([m for m in ('fastcl.train', 'typer', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
