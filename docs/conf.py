"""How the documentation is built: ``make docs``, offline, warnings being errors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lora_analysis

HERE = Path(__file__).parent

project = "lora_analysis"
author = "the lora_analysis authors"
copyright = author
release = version = lora_analysis.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "myst_nb"]
exclude_patterns = ["_build"]
# Docstrings put names into single backticks: all of them are code.
default_role = "code"
nitpicky = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False  # "np.bool_" would be read as a link

html_theme = "furo"
html_title = "lora_analysis"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Pages are run whenever they are built: what they show is what this version gives.
nb_execution_mode = os.environ.get("DOCS_EXECUTION", "force")
nb_execution_excludepatterns = ["notebooks/*"]  # executed by `make notebooks`, outputs kept
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
# One file per picture, the same for a screen and for a printer.
nb_mime_priority_overrides = [("html", "image/png", 0)]
suppress_warnings = ["mystnb.unknown_mime_type"]

_PUBLIC = frozenset(lora_analysis.__all__)


def copy_notebooks(_app: Any) -> None:
    """Put the executed notebooks where Sphinx finds them."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    for notebook in HERE.parent.glob("notebooks/*.ipynb"):
        shutil.copyfile(notebook, target / notebook.name)


def skip_what_lives_elsewhere(
    app: Any, _what: str, name: str, value: object, skip: bool, _options: object
) -> bool:
    """Leave out of a module's page what it imports, and what the package itself exports."""
    page = app.env.current_document.autodoc_module
    home = getattr(value, "__module__", page)
    return skip or name in _PUBLIC or not str(home).startswith(page)


def setup(app: Any) -> None:
    """Connect the two to Sphinx."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-skip-member", skip_what_lives_elsewhere)
