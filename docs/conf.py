"""Sphinx configuration: ``make docs`` builds ``docs/_build/index.html``."""

import re
import unicodedata
from importlib.resources import as_file, files
from pathlib import Path

from docutils import nodes
from fontTools import subset
from latex2mathml.converter import convert

import otloss

project = "otloss"
author = "The otloss authors"
project_copyright = "2026, The otloss authors"
version = release = otloss.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

GALLERY = [  # in the order of the page
    "first_loss", "choosing_eps", "gradient_flow", "eps_between", "batches", "outliers",
    "partial_transport", "barycenters", "images_on_grids",
    "barycentric_map", "pairs", "colour_transfer", "flow_matching", "matching_scores",
    "learning_a_cost", "gradient_modes", "second_order", "large_clouds",
]  # fmt: skip


def place(name: str) -> int:
    """The place of a script in the gallery; one that the list lacks comes last."""
    stem = name.removesuffix(".py")
    return GALLERY.index(stem) if stem in GALLERY else len(GALLERY)


sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": "/",  # all scripts are run
    "within_subsection_order": place,
    "min_reported_time": 0,
    "show_memory": False,
    "write_computation_times": False,  # its tables load scripts from the network
}
suppress_warnings = ["config.cache"]  # place is a function, which Sphinx cannot store

autosummary_generate = False  # tables of summaries, no page for each name
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # "x, y: clouds" is one entry
# Modules are named where they are, classes and functions as users import them.
add_module_names = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "otloss"
html_use_index = False  # the API page and the search have what it lists


def to_markup(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """In docstrings |x| is a norm, not a substitution; formulas and literals stay as they are. A
    page that is named is a link."""
    for i, line in enumerate(lines):
        if "\\" not in line:
            parts = line.split("``")
            line = "``".join(
                part if k % 2 else part.replace("|", r"\|") for k, part in enumerate(parts)
            )
        lines[i] = re.sub(r"docs/([\w-]+)\.md", r":doc:`\1`", line)


MATH_STYLE = """
@font-face { font-family: "STIX Two Math"; src: url("STIXTwoMath.woff"); }
math { font-family: "STIX Two Math", math; }
mtd[columnalign="right"] { text-align: right; padding-inline: 2em 0; }
mtd[columnalign="right"]:first-child { padding-inline-start: 0; }
mtd[columnalign="left"] { text-align: left; padding-inline: 0; }
"""

# What latex2mathml leaves to the renderer, which takes bars and the names of functions for
# operators with space around them or for variables, and a minus after = or ( for a difference.
SPACING = (
    (r"<mo>(&#x(?:0007C|02016);)", r'<mo stretchy="false" lspace="0" rspace="0">\1'),
    (r"<mo (stretchy[^>]*)>(&#x(?:0007C|02016);)", r'<mo lspace="0" rspace="0" \1>\2'),
    (r"<mi>(log|exp)</mi>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>'),
    (r"<mo>(max|min|tr|diag)</mo>", r'<mo lspace="0" rspace="0.17em">\1</mo>'),
    (r"(&#x0(?:003D|0028);</mo>)<mo>(&#x02212;)", r'\1<mo form="prefix" lspace="0" rspace="0">\2'),
)


def styled(match):  # type: ignore[no-untyped-def]
    """A bold, script or monospace character has a code of its own; of mathvariant browsers
    know "normal" alone."""
    kind = re.sub("LATIN (CAPITAL|SMALL) LETTER", r"\1", unicodedata.name(match[2]))
    return f">{unicodedata.lookup(f'MATHEMATICAL {match[1].upper()} {kind}')}<"


def mathml(node, display):  # type: ignore[no-untyped-def]
    """MathML, which browsers draw by themselves: the pages need neither scripts nor the network."""
    formula = convert(node.astext().replace("{aligned}", "{split}"), display=display)
    if re.search(r"<m[io]>(\\|&(amp;)?<)", formula):
        raise ValueError(f"latex2mathml does not know all of this formula: {node.astext()}")
    for found, better in SPACING:
        formula = re.sub(found, better, formula)
    return re.sub(r' mathvariant="(?!normal)(\w+)">(\w)<', styled, formula)


def math_font(app):  # type: ignore[no-untyped-def]
    """The font that formulas are drawn in, for devices that have none with the tables for it: what
    formulas use of STIX Two Math, from the package ziamath."""
    if app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    with as_file(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf") as font:
        ranges = "20-17F,2B0-3FF,2000-22FF,2308-230B,27E8-27EB,1D400-1D7FF"
        to = static / "STIXTwoMath.woff"
        subset.main([str(font), f"--unicodes={ranges}", "--flavor=woff", f"--output-file={to}"])
    (static / "math.css").write_text(MATH_STYLE)


def inline_formula(translator, node):  # type: ignore[no-untyped-def]
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def displayed_formula(translator, node):  # type: ignore[no-untyped-def]
    formula = mathml(node, "block")
    translator.body.append(
        f'<div class="math" style="overflow-y: hidden; padding-block: 0.6em">{formula}</div>'
    )
    raise nodes.SkipNode


def setup(app):  # type: ignore[no-untyped-def]
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("autodoc-process-docstring", to_markup)
    app.connect("builder-inited", math_font)
    app.add_css_file("math.css")
