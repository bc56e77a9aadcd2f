"""Sphinx configuration: ``make docs`` builds ``docs/_build/index.html``."""

from docutils import nodes
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
# Modules are named where they are, classes and functions as users import them.
add_module_names = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "otloss"
html_use_index = False  # the API page and the search have what it lists


def escape_bars(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """In docstrings |x| is a norm, not a substitution; formulas and literals stay as they are."""
    for i, line in enumerate(lines):
        if "\\" not in line:
            parts = line.split("``")
            lines[i] = "``".join(
                part if k % 2 else part.replace("|", r"\|") for k, part in enumerate(parts)
            )


def inline_formula(translator, node):  # type: ignore[no-untyped-def]
    """MathML, which browsers draw by themselves: the pages need neither scripts nor the network."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def displayed_formula(translator, node):  # type: ignore[no-untyped-def]
    formula = convert(node.astext(), display="block")
    translator.body.append(
        f'<div class="math" style="overflow-y: hidden; padding-block: 0.6em">{formula}</div>'
    )
    raise nodes.SkipNode


def setup(app):  # type: ignore[no-untyped-def]
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("autodoc-process-docstring", escape_bars)
