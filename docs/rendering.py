"""How the site shows docstrings and formulas: called by MkDocs and by mkdocstrings (mkdocs.yml).

Docstrings are written for `help()`, in the Sphinx style of PyTorch's own; formulas become pictures
(SVG) when the site is built, so that a reader's browser needs no script, font or network for them.
"""

from __future__ import annotations

import html
import re
from inspect import cleandoc
from typing import Any

import griffe
import ziamath

MATH_BLOCK = re.compile(r"^\.\. math::(.*(?:\n(?: +.*)?)*)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|mod):`([\w.]+)`")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
SIZE = 17  # pixels, for text of 16

ziamath.config.svg2 = False  # no <symbol> ids, which formulas of one page would share


class SphinxStyle(griffe.Extension):
    """Turns the Sphinx constructs that our docstrings use into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that is documented."""
        if obj.docstring is not None:
            text = cleandoc(obj.docstring.value)
            text = MATH_BLOCK.sub(lambda block: f"$$\n{_one_line(block[1])}\n$$\n\n", text)
            text = re.sub("^Example:$", "Examples:", text, flags=re.MULTILINE)  # the section's name
            obj.docstring.value = ROLE.sub(_link, text)


def on_page_content(content: str, **_: Any) -> str:
    """Draws the formulas of a finished page."""
    return FORMULA.sub(_drawn, content)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _link(role: re.Match[str]) -> str:
    name = role[1]
    return f"[`{name}`][{name if '.' in name else 'fastcl.' + name}]"


def _drawn(formula: re.Match[str]) -> str:
    tag, inline, source = formula[1], formula[1] == "span", _one_line(html.unescape(formula[2]))
    math = ziamath.Latex(source, size=SIZE, inline=inline, color="currentColor")
    attributes = f'role="img" aria-label="{html.escape(source)}"'
    if inline:
        attributes += f' style="vertical-align: {math.getyofst():.1f}px"'
    svg = math.svg().replace("<svg", f"<svg {attributes}", 1)
    return f'<{tag} class="formula">{svg}</{tag}>'
