from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.schema import SCHEMA_VERSION, SchemaError, dumps, load, save, without_paths
from tests.benchmarks.results import results, row


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    failed = row("compiled", status="failed: no compiler", seconds=None, errors=None)
    written = results(row(), row("eager", 2.5, extra_bytes=1 << 30), failed)
    save(written, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_each_row_is_one_line() -> None:
    lines = dumps(results(row(), row("eager"))).splitlines()
    assert len([line for line in lines if '"contender"' in line]) == 2


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        target: Any = document
        for key in parents:
            target = target[int(key) if key.isdigit() else key]
        target[last] = value

    return change


def _delete(document: dict[str, Any]) -> None:
    del document["rows"][0]["flops"]


def _repeat(document: dict[str, Any]) -> None:
    document["rows"].append(document["rows"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema_version", SCHEMA_VERSION + 1), "schema_version is 2; this code reads 1"),
        (_set("rows.0.n", "many"), r"rows\[0\]\.n is 'many'; expected int"),
        (_set("rows.0.n", True), r"rows\[0\]\.n is True; expected int"),
        (_set("rows.0.seconds.median", 99.0), r"rows\[0\]\.seconds are not in order"),
        (_set("rows.0.seconds", None), r"rows\[0\]: status is 'ok' and seconds is None"),
        (_set("rows.0.colour", "red"), r"rows\[0\] has unknown fields: colour"),
        (_set("header.device", "my laptop"), r"header\.device is str; expected an object"),
        (_set("header.command", "run /home/me/x.py"), "names a path of the machine: /home/me/"),
        (_set("rows", []), "rows is empty"),
        (_delete, r"rows\[0\] lacks flops"),
        (_repeat, r"rows\[1\] repeats clip-8192x512-float32 / forward\+backward / fastcl"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = json.loads(dumps(results(row())))
    change(document)
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match=message) as caught:
        load(file)
    assert str(caught.value).startswith("wrong.json: ")


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "half.json"
    file.write_text(dumps(results(row()))[:100])
    with pytest.raises(SchemaError, match=r"half\.json: "):
        load(file)


def test_a_wrong_result_is_not_written(tmp_path: Path) -> None:
    wrong = results(dataclasses.replace(row(), note="see /root/notes/today"))
    with pytest.raises(SchemaError, match="names a path"):
        save(wrong, tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_paths_are_taken_out_and_ratios_stay() -> None:
    assert (
        without_paths("no /usr/bin/g++ for avx512/amx at 1/2") == "no <path> for avx512/amx at 1/2"
    )
