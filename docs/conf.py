"""Sphinx configuration."""

from importlib.metadata import version as installed

project = "gpjepa"
author = "The gpjepa developers"
copyright = "2026, The gpjepa developers"
version = release = installed("gpjepa")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc sections name the types that matter
autodoc_member_order = "bysource"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_rtype = False
nb_execution_mode = "off"  # the notebook is committed as it was executed
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
suppress_warnings = ["mystnb.unknown_mime_type"]
templates_path = ["_templates"]
html_extra_path = ["benchmark_report"]  # the report as the benchmark wrote it
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

html_theme = "sphinx_book_theme"
html_title = "gpjepa"
html_theme_options = {
    "repository_url": "https://github.com/gpjepa/gpjepa",
    "use_repository_button": True,
    "path_to_docs": "docs",
}
