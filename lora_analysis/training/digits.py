"""The demo's data: scikit-learn's handwritten digits, upright and as three downstream tasks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.errors import InputError, MissingExtraError
from lora_analysis.patterns import near_names
from lora_analysis.training.data import Split, TaskData

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Images = NDArray[np.float32]

# The first 1,347 images of scikit-learn's file are for training, the last 450 for testing, in
# every task and in pretraining: no test image is ever trained on. The file goes writer by writer
# (its labels repeat with a period of 130), so nearly all test images come from hands not seen.
TRAIN_IMAGES = 1347

_WHITE = 16.0  # largest pixel value


def _upright(images: Images) -> Images:
    return images


def _rotate(images: Images) -> Images:
    return np.rot90(images, axes=(1, 2))  # a quarter turn, counter-clockwise


def _invert(images: Images) -> Images:
    return -images  # pixels lie in [-1, 1]: ink and paper change places


def _mirror(images: Images) -> Images:
    return images[:, :, ::-1]  # left and right change places


# What a model sees of the upright image ``(n, 8, 8)``; the labels stay.
UPRIGHT = "upright"
TASKS: Mapping[str, Callable[[Images], Images]] = MappingProxyType(
    {UPRIGHT: _upright, "rotate": _rotate, "invert": _invert, "mirror": _mirror}
)


def digits_task(task: str = UPRIGHT) -> TaskData:
    """Return the digits as one task shows them, split for training and testing.

    Parameters
    ----------
    task
        ``"upright"``, which the base model is pretrained on; ``"rotate"``, by 90°
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
        scikit-learn, which holds the images, is not installed.
    """
    if task not in TASKS:
        near = ", ".join(near_names(task, TASKS) or TASKS)
        message = f"There is no digits task '{task}'. Tasks: {near}."
        raise InputError(message)
    images, labels = _load()
    seen = np.ascontiguousarray(TASKS[task](images))
    return TaskData(
        train=Split(seen[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]),
        test=Split(seen[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]),
    )


def require_digits() -> Path:
    """Return the folder of scikit-learn, which holds the digits, without importing it.

    Raises
    ------
    MissingExtraError
        scikit-learn is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        message = (
            "The digits come with scikit-learn, which is not installed. "
            "Run: pip install 'lora-analysis[demo]'"
        )
        raise MissingExtraError(message)
    return Path(spec.origin).parent


def _load() -> tuple[Images, NDArray[np.int64]]:
    """Return all images, ``(1797, 8, 8)`` in [-1, 1], and their labels, in the file's order."""
    table = _table()
    images = (table[:, :-1] / (_WHITE / 2) - 1).astype(np.float32)
    return images.reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _table() -> NDArray[np.float64]:
    """Return scikit-learn's table, ``(1797, 65)``: 64 pixels from 0 to 16, then the label."""
    # Importing scikit-learn for one file costs every worker 110 MB and more than a second.
    file = require_digits() / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # a version that keeps it elsewhere

    found = load_digits()
    return np.column_stack([found.data, found.target])
