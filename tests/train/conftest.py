"""Without the `train` extra this folder is left out, and the header of the run says so."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = [
    name
    for name in ("kornia", "matplotlib", "rich", "sklearn", "tokenizers", "typer")
    if find_spec(name) is None
]

if MISSING:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.train.fixtures import captions, dataset, make_trainer, one_thread, small

    __all__ = ["captions", "dataset", "make_trainer", "one_thread", "small"]


def pytest_report_header() -> str | None:
    """Say what is left out."""
    return f"tests/train is left out: needs {', '.join(MISSING)}" if MISSING else None
