"""Text that is installed already: from which subpackage of SciPy or scikit-learn a docstring comes.

The source files are parsed, never imported. What would give the answer away is masked: the names
of the packages and subpackages, and the documented object's own.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from lora_analysis.errors import InputError, MissingExtraError
from lora_analysis.patterns import near_names
from lora_analysis.training.tables import Rows

# Subpackages with enough documented objects, by package; the task is called as the package.
TASKS: Final[Mapping[str, tuple[str, ...]]] = {
    "scipy": (
        "fft", "integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse",
        "spatial", "special", "stats",
    ),
    "sklearn": (
        "cluster", "covariance", "datasets", "decomposition", "ensemble", "feature_selection",
        "linear_model", "metrics", "model_selection", "preprocessing", "utils",
    ),
}  # fmt: skip
_LONGEST: Final = 600  # characters of a docstring that are kept: its first paragraphs
_SHORTEST: Final = 60
_MOST: Final = 150  # examples of a class
_MASK: Final = "it"
_SPACES: Final = re.compile(r"\s+")


def docstring_rows(task: str) -> tuple[Rows, None]:
    """Return docstrings and the subpackage of each, in an order that depends on the texts alone.

    Parameters
    ----------
    task
        ``"scipy"`` or ``"sklearn"``.

    Raises
    ------
    InputError
        There is no such task.
    MissingExtraError
        The package is not installed.
    """
    if task not in TASKS:
        near = ", ".join(near_names(task, TASKS) or TASKS)
        message = f"There is no task '{task}' among the docstrings. Tasks: {near}."
        raise InputError(message)
    rows = Rows(f"docstrings of {task}")
    for subpackage in TASKS[task]:
        texts = _texts(_package(task) / subpackage, task)
        chosen = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:_MOST]
        rows.rows += [(0, {"text": text, "label": subpackage}) for text in chosen]
    rows.rows = [(line, row) for line, (_, row) in enumerate(rows.rows, 1)]
    return rows, None


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        message = f"The text comes with {name}, which is not installed. Run: pip install {name}"
        raise MissingExtraError(message)
    return Path(spec.origin).parent


@lru_cache(maxsize=64)
def _texts(folder: Path, task: str) -> frozenset[str]:
    """Return the masked docstrings of a folder; parsing the sources takes seconds."""
    return frozenset(_docstrings(folder, task))


def _docstrings(folder: Path, task: str) -> Iterator[str]:
    """Yield the masked docstrings of the public objects below a folder, tests left out."""
    hidden = [task, *TASKS[task]]
    for path in sorted(folder.rglob("*.py")):
        if {"tests", "test", "externals"} & set(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name[:1] == "_":
                continue
            text = ast.get_docstring(node)
            if text and len(masked := _masked(text, [node.name, *hidden])) >= _SHORTEST:
                yield masked


def _masked(text: str, names: list[str]) -> str:
    """Return the start of a text on one line, every word that holds one of the names masked."""
    pattern = "|".join(sorted(map(re.escape, set(names)), key=len, reverse=True))
    plain = _SPACES.sub(" ", text[:_LONGEST]).strip()
    return re.sub(rf"[\w.]*(?:{pattern})[\w.]*", _MASK, plain, flags=re.IGNORECASE)
