"""The result file: its schema, and how it is checked, written and read.

A file is one JSON document: ``schema_version``, ``header`` (the run: device, versions, command)
and ``rows``, one for each case, phase and contender. README.md describes the fields. Whoever
changes a field's meaning raises :data:`SCHEMA_VERSION`; a new kind of contender is no change.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
OK = "ok"


class SchemaError(ValueError):
    """A result file that does not fit the schema."""


@dataclass(frozen=True)
class Device:
    """What computed."""

    kind: str  # cpu or cuda
    name: str
    features: list[str]  # CPU: the vector and matrix extensions that matter; GPU: sm_90
    cores: int  # CPU cores, or multiprocessors
    memory_gib: float
    driver: str | None


@dataclass(frozen=True)
class Header:
    """One run."""

    created: str  # ISO 8601, UTC
    command: str
    commit: str
    dirty: bool  # the working tree differed from the commit
    device: Device
    threads: int
    versions: dict[str, str | None]
    isa: dict[str, str | None]  # what fastcl's and torch's CPU kernels chose
    float32_matmul_precision: str
    gemm_tflops: dict[str, float]  # one large square product, by dtype
    other_load: float | None  # cores that other processes kept busy meanwhile: was it quiet?


@dataclass(frozen=True)
class Spread:
    """Seconds of one call."""

    median: float
    q1: float
    q3: float
    min: float
    max: float
    samples: int


@dataclass(frozen=True)
class Errors:
    """max abs(value - truth) / max abs(truth), truth in float64, on a problem of n x m.

    None: the value was not finite.
    """

    n: int
    m: int
    loss: float | None
    gradients: dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """One contender on one case. None: not measured, or without meaning here."""

    case: str
    loss: str
    n: int
    m: int
    d: int
    dtype: str
    phase: str  # "forward+backward", or "forward" (under no_grad)
    contender: str  # "fastcl", "eager", "compiled", "gemms", a variant or a peer
    backend: str | None  # fastcl's, where it is fastcl
    status: str  # "ok", or why there is no time
    product: str | None  # the dtype that is really multiplied
    flops: int  # gemms: what was multiplied; others: the loss's floor
    seconds: Spread | None = None
    tflops: float | None = None
    # Time over that of the case's own bare GEMMs, and over eager's: medians of rounds' ratios.
    of_gemms: float | None = None
    of_eager: float | None = None
    of_machine: float | None = None  # TFLOP/s over gemm_tflops of the dtype that is multiplied
    extra_bytes: int | None = None  # peak memory beside inputs and returned gradients
    errors: Errors | None = None
    note: str = ""


@dataclass(frozen=True)
class Results:
    """A whole file."""

    header: Header
    rows: list[Row]
    schema_version: int = field(default=SCHEMA_VERSION)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as the annotated type, or a SchemaError that says where it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(args[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_convert(args[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(k): _convert(args[1], x, f"{where}.{k}") for k, x in value.items()}
    if kind is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise SchemaError(f"{where} is {value!r}; expected {name}")


def _build(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise SchemaError(f"{where} is {type(value).__name__}; expected an object")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise SchemaError(f"{where} has unknown fields: {', '.join(unknown)}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    if missing := sorted(set(required) - set(value)):
        raise SchemaError(f"{where} lacks {', '.join(missing)}")
    return kind(**{k: _convert(hints[k], x, f"{where}.{k}") for k, x in value.items()})


_PATH = re.compile(r"(?<![\w.])[/~](?:[\w.+-]+/)+")


def without_paths(text: str) -> str:
    """The text with absolute paths of the machine taken out."""
    return re.sub(r"(?<![\w.])[/~](?:[\w.+-]+/)+[\w.+-]*", "<path>", text)


def validate(document: Any) -> Results:
    """The results in a decoded JSON document.

    Raises:
        SchemaError: it does not fit, with the field and what was expected.
    """
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise SchemaError(f"schema_version is {version!r}; this code reads {SCHEMA_VERSION}")
    results: Results = _build(Results, document, "file")
    if not results.rows:
        raise SchemaError("file.rows is empty; expected one row for each case and contender")
    seen = set()
    for i, row in enumerate(results.rows):
        where, s = f"file.rows[{i}]", row.seconds
        if (key := (row.case, row.phase, row.contender)) in seen:
            raise SchemaError(f"{where} repeats {' / '.join(key)}")
        seen.add(key)
        if (row.status == OK) != (s is not None):
            raise SchemaError(f"{where}: status is {row.status!r} and seconds is {s!r}")
        if s is not None and not 0 < s.min <= s.q1 <= s.median <= s.q3 <= s.max:
            raise SchemaError(f"{where}.seconds are not in order: {s}")
    if found := _PATH.search(json.dumps(document)):
        raise SchemaError(f"the file names a path of the machine: {found.group()}...")
    return results


def _rounded(value: Any) -> Any:
    """Floats to six digits: more is noise."""
    if isinstance(value, dict):
        return {k: _rounded(x) for k, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dumps(results: Results) -> str:
    """JSON with one line for each row, so that changes are easy to review."""
    document = _rounded(dataclasses.asdict(results))
    header = json.dumps(document["header"], indent=1, allow_nan=False).replace("\n", "\n ")
    rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in document["rows"])
    version = f'"schema_version": {results.schema_version}'
    return f'{{\n {version},\n "header": {header},\n "rows": [\n  {rows}\n ]\n}}\n'


def save(results: Results, path: Path) -> None:
    """Checks the results and writes them: the whole file, or none."""
    text = dumps(results)
    validate(json.loads(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path) -> Results:
    """Reads and checks a file.

    Raises:
        SchemaError: it is not JSON, or does not fit the schema; the message names the file.
    """
    try:
        return validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, SchemaError) as error:
        raise SchemaError(f"{path.name}: {error}") from None
