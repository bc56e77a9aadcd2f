"""Sphinx configuration: ``make docs`` builds ``docs/_build/index.html``."""

import otloss

project = "otloss"
author = "The otloss authors"
project_copyright = "2026, The otloss authors"
version = release = otloss.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Modules are named where they are, classes and functions as users import them.
add_module_names = False

html_theme = "furo"
html_title = "otloss"


def escape_bars(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """In docstrings |x| is a norm, not a substitution; formulas and literals stay as they are."""
    for i, line in enumerate(lines):
        if "\\" not in line:
            parts = line.split("``")
            lines[i] = "``".join(
                part if k % 2 else part.replace("|", r"\|") for k, part in enumerate(parts)
            )


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-docstring", escape_bars)
