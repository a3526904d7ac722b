"""What README.md shows works: its Python runs, and the commands that it and docs/ name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: their language, "" where none is said, and their lines."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """The words after `program` in each of a page's shell lines and `inline code` that start so."""
    shell = [line for language, block in blocks(text) if not language for line in block.split("\n")]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", prose)
    found = (line.partition("#")[0].split() for line in (*shell, *inline))
    return [words[1:] for words in found if words[:1] == [program] and len(words) > 1]


def named(program: str) -> list[list[str]]:
    """The commands of all pages."""
    return [words for page in PAGES for words in commands(page.read_text("utf-8"), program)]


def test_commands_are_found_in_blocks_and_in_prose() -> None:
    page = "`make a` of `make`.\n```\nmake b  # says\nfastcl x --y z\n```\n```python\nmake c\n```\n"
    assert commands(page, "make") == [["b"], ["a"]]
    assert commands(page, "fastcl") == [["x", "--y", "z"]]


def test_the_python_of_the_readme_runs() -> None:
    """In order and in one namespace, as a reader would type it."""
    sources = [code for language, code in blocks(PAGES[0].read_text("utf-8")) if language]
    assert len(sources) >= 3
    names: dict[str, Any] = {"__name__": "readme"}
    for source in sources:
        exec(compile(source, "README.md", "exec"), names)
    assert all(names[encoder].weight.grad.any() for encoder in ("image_encoder", "text_encoder"))
    assert names["log_scale"].grad != 0


def test_every_make_command_has_its_target() -> None:
    targets = re.findall(
        r"^(\w[\w-]*):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE
    )
    used = {words[0] for words in named("make")}
    assert {"demo", "test"} <= used
    assert used <= set(targets)


def test_every_fastcl_command_has_its_options() -> None:
    typer = pytest.importorskip("typer")
    from fastcl.train.__main__ import app

    known = typer.main.get_command(app).commands
    used = named("fastcl")
    assert used
    for name, *words in used:
        assert name in known
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}
