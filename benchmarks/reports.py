"""Result files of what is counted rather than timed: one JSON document, a line for each row.

``kind`` says what the rows are (their dataclass documents them). The header is the benchmarks'
own; see schema.py. Whoever changes a field's meaning raises :data:`SCHEMA_VERSION`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks.device import default_path, make_header
from benchmarks.schema import Device, Header, Results, SchemaError, without_paths

SCHEMA_VERSION = 1
R = TypeVar("R")


@dataclass(frozen=True)
class Report(Generic[R]):
    """A whole file."""

    kind: str
    header: Header
    rows: list[R]


def header_of_ranks(kind: str) -> Header:
    """The run as it begins: its ranks are processes of one thread on this machine's CPU."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if word != "--out" or next(words, None) is None]
    command = " ".join([f"python -m benchmarks.{kind}", *kept])
    header = make_header(torch.device("cpu"))
    return dataclasses.replace(header, command=without_paths(command), threads=1)


def save(report: Report[Any], out: Path) -> Path:
    """Writes the file, in a directory under the usual name; returns its path."""
    if out.is_dir():
        out = out / f"{report.kind}-{default_path(Results(report.header, [])).name}"
    header = json.dumps(dataclasses.asdict(report.header), indent=1).replace("\n", "\n ")
    rows = ",\n  ".join(json.dumps(dataclasses.asdict(row)) for row in report.rows)
    version = f'"kind": "{report.kind}",\n "schema_version": {SCHEMA_VERSION}'
    out.write_text(f'{{\n {version},\n "header": {header},\n "rows": [\n  {rows}\n ]\n}}\n')
    return out


def load(path: Path, kind: str, row: type[R]) -> Report[R]:
    """Reads a file of that kind.

    Raises:
        SchemaError: it is of another kind or version, or a row has other fields.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    found = document.get("kind"), document.get("schema_version")
    if found != (kind, SCHEMA_VERSION):
        raise SchemaError(f"{path.name} is {found}; expected {(kind, SCHEMA_VERSION)}")
    try:
        header = document["header"]
        header = Header(**{**header, "device": Device(**header["device"])})
        return Report(kind, header, [row(**fields) for fields in document["rows"]])
    except (KeyError, TypeError) as error:
        raise SchemaError(f"{path.name}: {error}") from None


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns are words and whose others are numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))
