"""README.md and the documentation: their code runs, their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import otloss

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_runs(page, capsys):
    """The blocks of one page, one after the other, as a reader types them."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        source = "\n" * line + block[1]  # so that a traceback names the page's own line
        exec(compile(source, str(page), "exec"), namespace)


LINK = re.compile(r"\]\(([^)#\s:]*)(?:#[^)\s]*)?\)")
SCRIPTS = {path.stem for path in (ROOT / "examples" / "gallery").glob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page):
    """Files that links and pictures name; a page of the gallery is there where its script is."""
    for target in filter(None, LINK.findall(page.read_text(encoding="utf-8"))):
        if target.startswith("gallery/"):
            assert target.removeprefix("gallery/") in {"index", *SCRIPTS}, target
        else:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_have_as_many_cells_as_columns(page):
    """A row with more cells loses them, one with fewer is a pipe in its text."""
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        rows = [re.sub(r"\\\|", "", row) for row in table.splitlines()]
        assert len({row.count("|") for row in rows}) == 1, rows[0]


def test_pictures_of_the_front_page_are_small():
    for picture in (ROOT / "docs" / "images").iterdir():
        assert 5_000 < picture.stat().st_size < 1_000_000, picture.name


MODULES = ["otloss", *(found.name for found in pkgutil.walk_packages(otloss.__path__, "otloss."))]
DOCSTRINGS = [
    found
    for name in MODULES
    if not name.endswith("._C")
    for found in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if found.examples
]


@pytest.mark.parametrize("docstring", DOCSTRINGS, ids=lambda docstring: docstring.name)
def test_examples_of_docstrings_run(docstring):
    """They show what they say they show, as a user types them after two imports."""
    docstring.globs.update(torch=torch, otloss=otloss)
    assert doctest.DocTestRunner().run(docstring).failed == 0


def test_every_public_call_has_an_example():
    described = {docstring.name.split(".")[-1] for docstring in DOCSTRINGS}
    calls = {name for name in otloss.__all__ if callable(getattr(otloss, name))}
    shows_nothing = {"BarycenterInfo", "ConvergenceWarning", "progress"}
    assert calls - described == shows_nothing
