"""The command line, end to end, on tiny problems."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.schema import OK, load

TINY = ["--preset", "quick", "--n", "48", "--d", "16", "--m", "200", "--rounds", "2"]
TINY += ["--threads", "1"]
QUICK = [*TINY, "--no-memory", "--no-compile"]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_writes_a_valid_file_with_every_contender(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    output = _run(*QUICK, "--forward", "--dtype", "float32,bfloat16", "--output", str(file))
    results = load(file)
    assert results.header.gemm_tflops.keys() == {"float32", "bfloat16"}
    assert results.header.threads == 1
    by_case: dict[tuple[str, str], set[str]] = {}
    for row in results.rows:
        assert row.status == OK, row
        assert row.tflops is not None
        by_case.setdefault((row.case, row.phase), set()).add(row.contender)
        if row.contender in ("fastcl", "eager") and row.phase == "forward+backward":
            assert row.errors is not None
            assert row.of_gemms is not None
    assert len(by_case) == 5 * 2 * 2  # losses, dtypes, phases
    for (case, _), contenders in by_case.items():
        variant = {"eager-transposed"} if case.startswith("clip") else set()
        assert contenders == {"fastcl", "eager", "gemms"} | variant
    assert "Bars" in output
    table = _run("table", str(file))
    assert "### clip-48x16-float32, forward+backward" in table
    assert str(tmp_path) not in file.read_text()


def test_a_wrong_file_is_refused_by_table(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text('{"schema_version": 0}')
    result = CliRunner().invoke(app, ["table", str(file)])
    assert result.exit_code == 2
    assert "schema_version is 0" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "triplet"], "triplet is not known"),
        (["--dtype", "int8"], "dtype 'int8' is not known"),
        (["--backend", "abacus"], "backend='abacus' is not known"),
        (["--preset", "huge"], "huge is not one of"),
        (["--contenders", "fastcl,nobody"], "nobody is not known"),
        (["--device", "abacus"], "abacus is not known; expected cpu or cuda"),
        (["--device", "cuda:99"], "sees no cuda:99 here"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [*QUICK, *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.output)


def test_a_peer_that_fails_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ImportError("No module named 'peer'\nat /usr/lib/peer/x.py")

    monkeypatch.setattr("benchmarks.contenders.EAGER", {"clip": missing})
    file = tmp_path / "results.json"
    _run(*QUICK, "--loss", "clip", "--contenders", "fastcl,eager", "--output", str(file))
    ours, eager = load(file).rows
    assert ours.status == OK
    assert eager.status == "failed: ImportError: No module named 'peer'"


@pytest.mark.slow
def test_compile_and_memory_are_measured_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "results.json"
    _run(*TINY, "--loss", "siglip", "--compile", "--memory", "--output", str(file))
    rows = {row.contender: row for row in load(file).rows}
    assert rows["compiled"].status == OK or rows["compiled"].status.startswith("failed: ")
    assert rows["fastcl"].extra_bytes is not None
    assert "picture" in _run("plot", str(file))
    assert (tmp_path / "results.png").stat().st_size > 1000
