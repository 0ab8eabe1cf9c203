"""Data that come with installed packages: scikit-learn's digits, and docstrings as texts.

The digits are shown upright (for pretraining) and as three downstream tasks. Docstrings of SciPy
or scikit-learn are classified by subpackage; the sources are parsed, never imported, and what
would give the answer away is masked: the names of packages, subpackages and of the object itself.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.patterns import near_names
from lora_analysis.training.data_files import Rows
from lora_analysis.training.inputs import package_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.training.tasks import TaskData

    Images = NDArray[np.float32]

# The first 1,347 images of scikit-learn's file are for training, the last 450 for testing, in
# every task and in pretraining: no test image is ever trained on. The file is ordered by writer
# (its labels repeat with a period of 130), so nearly all test images are by unseen writers.
TRAIN_IMAGES = 1347
UPRIGHT = "upright"
# Transforms of the upright images ``(n, 8, 8)`` with pixels in [-1, 1]; the labels do not change.
TASKS: Mapping[str, Callable[[Images], Images]] = MappingProxyType(
    {
        UPRIGHT: lambda images: images,
        "rotate": lambda images: np.rot90(images, axes=(1, 2)),  # 90° counter-clockwise
        "invert": lambda images: -images,  # dark for light
        "mirror": lambda images: images[:, :, ::-1],  # left for right
    }
)
_WHITE = 16.0  # largest pixel value in the file


def digits_task(task: str = UPRIGHT) -> TaskData:
    """Return the digits in the form of one task, split for training and testing.

    Parameters
    ----------
    task
        ``"upright"``, on which the base model is pretrained; ``"rotate"``, by 90°
        counter-clockwise; ``"invert"``, dark for light; ``"mirror"``, left for right.

    Returns
    -------
    TaskData
        Images ``(n, 8, 8)``, float32 in [-1, 1], and labels ``(n,)`` from 0 to 9: 1,347 to train,
        450 to test.

    Raises
    ------
    InputError
        There is no such task.
    MissingExtraError
        scikit-learn, which contains the images, is not installed.
    """
    from lora_analysis.training.tasks import DataSplit, TaskData

    if task not in TASKS:
        near = ", ".join(near_names(task, TASKS) or TASKS)
        message = f"There is no digits task '{task}'. Tasks: {near}."
        raise InputError(message)
    # Importing scikit-learn for one file costs every worker 110 MB and more than a second.
    file = require_digits() / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        table = np.loadtxt(
            file, delimiter=","
        )  # (1797, 65): 64 pixels from 0 to 16, then the label
    else:
        from sklearn.datasets import load_digits  # a version with another layout

        digits = load_digits()
        table = np.column_stack([digits.data, digits.target])
    images = (table[:, :-1] / (_WHITE / 2) - 1).astype(np.float32).reshape(-1, 8, 8)
    labels = table[:, -1].astype(np.int64)
    inputs = np.ascontiguousarray(TASKS[task](images))
    return TaskData(
        train=DataSplit(inputs[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]),
        test=DataSplit(inputs[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]),
    )


def require_digits() -> Path:
    """Return the folder of scikit-learn, which contains the digits, without importing it.

    Raises
    ------
    MissingExtraError
        scikit-learn is not installed.
    """
    return package_folder("sklearn", "The digits come with scikit-learn", extra="demo")


_SUBPACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "scipy": (
        "fft", "integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse",
        "spatial", "special", "stats",
    ),
    "sklearn": (
        "cluster", "covariance", "datasets", "decomposition", "ensemble", "feature_selection",
        "linear_model", "metrics", "model_selection", "preprocessing", "utils",
    ),
}  # fmt: skip
_MAX_CHARACTERS: Final = 600  # of a docstring: its first paragraphs
_MIN_CHARACTERS: Final = 60
_MAX_PER_CLASS: Final = 150
_MASK: Final = "it"


def docstring_rows(task: str) -> Rows:
    """Return docstrings and the subpackage of each, in an order that depends only on the texts.

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
    if task not in _SUBPACKAGES:
        near = ", ".join(near_names(task, _SUBPACKAGES) or _SUBPACKAGES)
        message = f"There is no docstrings task '{task}'. Tasks: {near}."
        raise InputError(message)
    folder = package_folder(task, f"The texts come with {task}", extra="demo-text")
    rows = Rows(f"docstrings of {task}")
    for subpackage in _SUBPACKAGES[task]:
        texts = sorted(
            _masked_docstrings(folder / subpackage, task),
            key=lambda text: hashlib.sha256(text.encode()).digest(),
        )
        rows.rows += [(0, {"text": t, "label": subpackage}) for t in texts[:_MAX_PER_CLASS]]
    rows.rows = [(line, row) for line, (_, row) in enumerate(rows.rows, 1)]
    return rows


@lru_cache(maxsize=64)
def _masked_docstrings(folder: Path, task: str) -> frozenset[str]:
    """Return the masked docstrings of the public objects below a folder, without tests.

    Cached, because parsing the sources takes seconds.
    """
    hidden = {task, *_SUBPACKAGES[task]}
    texts = set()
    for path in sorted(folder.rglob("*.py")):
        if {"tests", "test", "externals"} & set(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name[:1] == "_":
                continue
            text = re.sub(r"\s+", " ", (ast.get_docstring(node) or "")[:_MAX_CHARACTERS]).strip()
            names = sorted(map(re.escape, hidden | {node.name}), key=len, reverse=True)
            # Every word that contains one of the names is masked.
            word = rf"[\w.]*(?:{'|'.join(names)})[\w.]*"
            masked = re.sub(word, _MASK, text, flags=re.IGNORECASE)
            if len(masked) >= _MIN_CHARACTERS:
                texts.add(masked)
    return frozenset(texts)
