"""How Sphinx builds the pages, the README and the results among them; warnings are errors.

python -m sphinx -W --keep-going -q -c docs . build/docs
"""

from __future__ import annotations

import re
from typing import Any

import tests  # noqa: F401  (silences what other libraries log when imported)
from peft_sam import __version__

project = "peft_sam"
copyright = "the authors of peft_sam, Apache License 2.0"
release = version = __version__

# Sphinx reads from the root, so that links between pages and to any file of the repository are checked
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benchmarks/*.md", "benchmarks/**/*.md"]
exclude_patterns = [".*", "build", "output", "**/output"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
myst_heading_anchors = 4

# docstrings are plain text with `names` in backticks
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False


def escape(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """|x| is an absolute value in a docstring, and `x`s more than one; reStructuredText wants both said otherwise."""
    lines[:] = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line.replace("|", r"\|")) for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", escape)
