"""How the documentation is built: ``make docs``, offline, warnings being errors."""

from __future__ import annotations

import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from latex2mathml.converter import convert as latex_to_mathml

import lora_analysis
from lora_analysis.cli import VERBS, group

HERE = Path(__file__).parent

project = "lora_analysis"
author = "the lora_analysis authors"
copyright = author
release = version = lora_analysis.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
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
html_math_renderer = "mathml"  # what browsers draw by themselves: no script, nothing to fetch

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


def write_commands(_app: Any) -> None:
    """Write the page of the commands: of each, exactly what ``--help`` prints."""
    parts = [_titled("Commands", "="), _COMMANDS, _help(group, "lora-analysis")]
    for verb in VERBS:
        command = group.get_command(click.Context(group), verb)
        assert command is not None
        name = f"lora-analysis {verb}"
        parts += [_titled(name, "-"), _help(command, name)]
    (HERE / "reference" / "commands.rst").write_text("\n".join(parts), encoding="utf-8")


_COMMANDS = """What ``--help`` prints. Data goes to stdout, everything else to stderr. Exit codes:
0 done (a module left out by rule is a finding, not a failure), 1 a bug, 2 usage, 3 refused (input,
a missing extra, a folder in use, a full disk), 4 done, but a source failed or a module could not be
read, matched or computed, 5 a check failed, 6 a check was inconclusive, 130 interrupted, 141 the
reader of stdout went away. Where several apply: 3, 5, 6, 4.
"""


def _titled(text: str, mark: str) -> str:
    return f"{text}\n{mark * len(text)}\n"


def _help(command: click.Command, name: str) -> str:
    with click.Context(command, info_name=name, terminal_width=90, max_content_width=90) as context:
        return ".. code-block:: text\n\n" + textwrap.indent(command.get_help(context), "   ") + "\n"


def skip_what_lives_elsewhere(
    app: Any, _what: str, name: str, value: object, skip: bool, _options: object
) -> bool:
    """Leave out of a module's page what it imports, and what the package itself exports."""
    page = app.env.current_document.autodoc_module
    home = getattr(value, "__module__", page)
    return skip or name in _PUBLIC or not str(home).startswith(page)


# Pages of the types of other packages that signatures name. Inventories would have to be fetched at
# every build.
_ELSEWHERE = {
    "np.": "https://numpy.org/doc/stable/reference/arrays.scalars.html#numpy.{}",
    "pd.": "https://pandas.pydata.org/docs/reference/api/pandas.{}.html",
    "torch.": "https://docs.pytorch.org/docs/stable/generated/torch.{}.html",
    "nn.": "https://docs.pytorch.org/docs/stable/generated/torch.nn.{}.html",
}
_SINGLE_PAGES = {
    "NDArray": "https://numpy.org/doc/stable/reference/typing.html#numpy.typing.NDArray",
    "ArrayLike": "https://numpy.org/doc/stable/reference/typing.html#numpy.typing.ArrayLike",
    "np.ndarray": "https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html",
    "Axes": "https://matplotlib.org/stable/api/_as_gen/matplotlib.axes.Axes.html",
    "Figure": "https://matplotlib.org/stable/api/_as_gen/matplotlib.figure.Figure.html",
    "Path": "https://docs.python.org/3/library/pathlib.html#pathlib.Path",
    "torch.Tensor": "https://docs.pytorch.org/docs/stable/tensors.html",
}


def link_other_packages(_app: Any, _env: Any, node: Any, contnode: nodes.Element) -> Any:
    """Link a type of numpy, pandas, matplotlib or torch to its documentation."""
    target = node.get("reftarget", "")
    package, dot, name = target.rpartition(".")
    pattern = _SINGLE_PAGES.get(target) or _ELSEWHERE.get(package + dot)
    if pattern is None:
        return None
    return nodes.reference("", "", contnode, refuri=pattern.format(name), internal=False)


def inline_math(self: Any, node: nodes.math) -> None:
    """Write a formula as MathML."""
    self.body.append(latex_to_mathml(node.astext()))
    raise nodes.SkipNode


def block_math(self: Any, node: nodes.math_block) -> None:
    """Write a formula that stands by itself."""
    self.body.append(latex_to_mathml(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Connect these to Sphinx."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("builder-inited", write_commands)
    app.connect("missing-reference", link_other_packages)
    app.connect("autodoc-skip-member", skip_what_lives_elsewhere)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
