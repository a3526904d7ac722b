"""The public face: names, signatures, docstrings, imports, and what is shipped."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import fastcl
import fastcl.compat.open_clip

ROOT = Path(fastcl.__file__).parent
REPOSITORY = Path(__file__).parents[1]
FUNCTIONS = sorted(n for n in fastcl.__all__ if isinstance(getattr(fastcl, n), FunctionType))
PACKAGES = (
    fastcl,
    fastcl.caching,
    fastcl.compat,
    fastcl.distributed,
    fastcl.functional,
    fastcl.losses,
    fastcl.reference,
)
SPECIFIED = sorted(set(FUNCTIONS) - {"available_backends", "explain", "grad_cache", "use_backend"})
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages([str(ROOT)], "fastcl.")
    if not m.name.startswith(("fastcl.train", "fastcl._C"))
)


def test_what_is_public() -> None:
    assert set(SPECIFIED) == set(fastcl.reference.__all__)
    assert set(fastcl.functional.__all__) <= set(SPECIFIED)
    assert len(SPECIFIED) == 7
    for package in PACKAGES:
        assert package.__all__ == sorted(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)
        assert package.__doc__


@pytest.mark.parametrize("name", SPECIFIED)
def test_the_reference_has_the_same_signature(name: str) -> None:
    ours = inspect.signature(getattr(fastcl, name), eval_str=True)
    reference = inspect.signature(getattr(fastcl.reference, name), eval_str=True)
    assert ours == reference
    assert getattr(fastcl, name) is not getattr(fastcl.reference, name)


def _sections(name: str) -> tuple[str, dict[str, str]]:
    """A docstring's first line, and its sections by their headings."""
    text = inspect.getdoc(getattr(fastcl, name)) or ""
    parts = re.split(r"^(Args|Returns|Raises|Example|Source):", text, flags=re.MULTILINE)
    return text.partition("\n")[0], dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", SPECIFIED)
def test_docstrings_are_complete(name: str) -> None:
    summary, sections = _sections(name)
    assert re.fullmatch(r"[A-Z].*\.", summary)
    assert list(sections) == ["Args", "Returns", "Raises", "Example", "Source"]
    assert all(body.strip() for body in sections.values())
    assert ">>>" in sections["Example"]
    assert re.search(r"\b(19|20)\d\d\b", sections["Source"]), "a source has a year"


@pytest.mark.parametrize("name", SPECIFIED)
def test_every_argument_is_documented_and_nothing_else(name: str) -> None:
    args = _sections(name)[1]["Args"]
    documented: set[str] = set()
    for heads in re.findall(r"(?:^ {4}|; )(\w+(?:, \w+)*):", args, flags=re.MULTILINE):
        documented |= set(heads.split(", ")) - {"None"}  # "None:" explains a value
    assert documented == set(inspect.signature(getattr(fastcl, name)).parameters)


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - set(SPECIFIED)))
def test_the_other_functions_have_a_summary_and_an_example(name: str) -> None:
    summary, sections = _sections(name)
    assert re.fullmatch(r"[A-Z].*\.", summary)
    assert ">>>" in sections["Example"]


@pytest.mark.parametrize("name", ["fastcl", *MODULES])
def test_doctests(name: str) -> None:
    if name.startswith("fastcl.kernels.triton."):
        pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module(name)
    assert module.__doc__, "a module says what it is for"
    assert doctest.testmod(module).failed == 0


def test_every_public_function_has_a_doctest_that_runs() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in FUNCTIONS:
        (found,) = finder.find(getattr(fastcl, name), name)
        assert found.examples, name


# ---- imports follow the arrows ----

# What each part may import of fastcl, beside itself; "" is fastcl/__init__.py.
ARROWS = {
    "_version": set(),
    "__main__": {"train"},
    "reference": set(),
    "kernels": {"_C"},
    "distributed": {"kernels"},
    "similarity": {"distributed", "kernels", "reference"},
    "functional": {"similarity", "distributed", "kernels", "reference"},
    "losses": {"functional", "similarity", "distributed", "kernels"},
    "compat": {"losses", "functional", "caching", "distributed"},
    "caching": {"distributed"},
    "": {
        "_version",
        "caching",
        "compat",
        "distributed",
        "functional",
        "kernels",
        "losses",
        "reference",
        "similarity",
    },
}


def _part(module: str) -> str:
    """ "similarity" for "fastcl.similarity.ops"."""
    return module.split(".")[1] if "." in module else ""


def _imported(source: str, package: str) -> Iterator[str]:
    """The parts of fastcl that a file in `package` imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            bare = base == "fastcl"  # from fastcl import reference
            names = [f"{base}.{a.name}" if bare else base for a in node.names]
        else:
            continue
        yield from (_part(name) for name in names if name.split(".")[0] == "fastcl")


def _edges() -> set[tuple[str, str]]:
    edges = set()
    for file in ROOT.rglob("*.py"):
        package = ".".join(["fastcl", *file.relative_to(ROOT).parts[:-1]])
        here = _part(".".join(["fastcl", *file.relative_to(ROOT).with_suffix("").parts]))
        here = "" if here == "__init__" else here
        edges |= {(here, there) for there in _imported(file.read_text(), package)}
    return edges


def test_imports_are_read_in_every_form() -> None:
    source = """
import fastcl.train.run, torch
from fastcl import losses as l, kernels
from ..similarity import ops
from . import plan
def later():
    from fastcl.functional.clip import clip_loss
"""
    right = {"train", "losses", "kernels", "similarity", "functional"}
    assert set(_imported(source, "fastcl.kernels")) == right


def test_imports_follow_the_arrows() -> None:
    edges = {(a, b) for a, b in _edges() if a != b}
    assert {("similarity", "kernels"), ("functional", "similarity"), ("", "losses")} <= edges
    outside = {(a, b) for a, b in edges if a != "train"}
    assert {a for a, _ in outside} <= set(ARROWS)
    assert not {(a, b) for a, b in outside if b not in ARROWS[a]}
    assert {a for a, b in edges if b == "train"} == {"__main__"}


def test_the_losses_do_not_import_the_compiled_kernels_directly() -> None:
    assert {a for a, b in _edges() if b == "_C"} == {"kernels"}


def test_importing_fastcl_imports_nothing_heavy() -> None:
    """Not even where they are installed, and not even tried."""
    script = """
import sys, torch
class Watch:
    def find_spec(self, name, path=None, target=None):
        tried.append(name)
tried = []
sys.meta_path.insert(0, Watch())
import fastcl
print(*{name.split(".")[0] for name in tried}, *(n for n in sys.modules if n == "fastcl.train"))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tried = set(run.stdout.split())
    assert "fastcl" in tried
    heavy = {"triton", "sklearn", "matplotlib", "typer", "rich", "kornia", "tokenizers", "psutil"}
    assert not tried & {*heavy, "fastcl.train"}


# ---- what is shipped ----


def test_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()
    assert 'fastcl = ["py.typed"]' in (REPOSITORY / "pyproject.toml").read_text()
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(fastcl, name), eval_str=True)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter)


def test_the_version_is_the_changelogs() -> None:
    headings = re.findall(r"^## (\S+) - (\S+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert headings[0][0] == fastcl.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastcl.__version__)
    assert all(re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", date) for _, date in headings)
