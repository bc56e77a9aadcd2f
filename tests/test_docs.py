"""README.md and the documentation: their code runs, their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
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
            name = re.sub(r"images/thumb/sphx_glr_(\w+)_thumb.png", r"\1", target)
            assert name.removeprefix("gallery/") in {"index", *SCRIPTS}, target
        else:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_have_as_many_cells_as_columns(page):
    """A row with more cells loses them, one with fewer is a pipe in its text."""
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        rows = [re.sub(r"\\\|", "", row) for row in table.splitlines()]
        assert len({row.count("|") for row in rows}) == 1, rows[0]


# What a page's reader does not read: comments, code, pictures, the targets of links.
UNREAD = re.compile(
    r"<!--.*?-->|^```.*?^```|!\[[^]]*\]\([^)]*\)|(?<=\])\([^)]*\)", re.DOTALL | re.MULTILINE
)
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$]+\$", re.DOTALL)


def words_read(text):
    """A formula is one word; cells of tables that hold a figure are looked up, not read."""
    text = FORMULA.sub("formula", UNREAD.sub("", text))
    lines = (line.split("|") if line.startswith("|") else [line] for line in text.splitlines())
    cells = (
        cell for line in lines for cell in line if len(line) == 1 or not re.search(r"\d", cell)
    )
    return sum(len(re.findall(r"\S*\w\S*", cell)) for cell in cells)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_is_long(page):
    """A page answers one question, in six minutes of reading."""
    assert words_read(page.read_text(encoding="utf-8")) <= 1500


SITE = """<a href="there.html">dead</a> <a href="#nowhere">dead</a> <a href="#top" id="top">well</a>
<script src="https://example.org/script.js"></script>"""
DRAWN = """<article><img src="none.png"> <p style="width: 900px">leaves</p>
<div style="overflow-x: auto"><p style="width: 5000px">scrolls</p></div></article>"""


def test_the_check_of_the_built_site_finds_faults(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    check = importlib.import_module("check")
    (tmp_path / "index.html").write_text(SITE)
    endings = sorted(line.split()[-1] for line in check.dead_links(tmp_path))
    assert endings == ["network", "nowhere", "nowhere"]
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser:
        (tmp_path / "index.html").write_text(DRAWN)
        found = check.badly_drawn(tmp_path, browser)
        assert len(found) == 3  # the picture at two widths, the paragraph at that of a phone
        assert "leaves" in found[-1]


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


CALLS = {name for name in otloss.__all__ if callable(getattr(otloss, name))}
CALLS -= {"BarycenterInfo", "ConvergenceWarning", "OTResult"}  # which nobody calls


def test_every_public_call_has_an_example():
    described = {docstring.name.split(".")[-1] for docstring in DOCSTRINGS}
    assert {*CALLS, "OTResult"} <= described


def parameters_described(call, seen):
    """The text of its docstring and of those that it refers to."""
    text = inspect.getdoc(call) or ""
    for name in re.findall(r":(?:func|class):`([\w.]+)`", text):
        place, _, last = name.removeprefix("otloss.").rpartition(".")
        of = getattr(inspect.getmodule(call), last, None) or getattr(otloss, last, None)
        if of is not None and of not in seen and place in ("", "distributed"):
            text += parameters_described(of, {*seen, of})
    return text


@pytest.mark.parametrize("name", sorted(CALLS), ids=str)
def test_docstrings_name_every_parameter_and_error(name):
    call = getattr(otloss, name)
    text = parameters_described(call, {call})
    for parameter in inspect.signature(call).parameters:
        assert re.search(rf"\b{parameter}\b", text), parameter
    assert re.search("Raises:|raises|errors", text)
