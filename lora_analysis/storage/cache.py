"""Disk cache of expensive results, keyed by the hash of their inputs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FOLDER_VARIABLE: Final = "LORA_ANALYSIS_CACHE"
SIZE_VARIABLE: Final = "LORA_ANALYSIS_CACHE_GB"
DEFAULT_GIGABYTES: Final = 20.0


def cache_folder() -> Path:
    """Return the folder of cached results: ``$LORA_ANALYSIS_CACHE``, or the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lora-analysis"


def cache_limit() -> int:
    """Return the limit in bytes: ``$LORA_ANALYSIS_CACHE_GB`` gigabytes, 20 by default.

    Raises
    ------
    InputError
        The variable is not a number of at least 0.
    """
    text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GIGABYTES)
    try:
        size = float(text)
    except ValueError:
        size = float("nan")
    if not 0 <= size < float("inf"):
        message = f"{SIZE_VARIABLE} must be a number of gigabytes, found {text!r}."
        raise InputError(message)
    return int(size * 1e9)


def read_cached(key: str) -> dict[str, NDArray[Any]] | None:
    """Return the arrays that are cached under a key; None if there are none, or damaged ones."""
    path = _path(key)
    try:
        tensors = open_tensors(path)
        arrays = {name: tensors.read(name) for name in tensors.infos}
    except (InputError, OSError):
        return None
    with suppress(OSError):
        path.touch()  # the least recently used are deleted first
    return arrays


def write_cached(key: str, arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Cache arrays under a key; delete the least recently used ones if there is no room.

    Returns
    -------
    bool
        False if the arrays alone exceed the limit, or the disk refuses.
    """
    from safetensors.numpy import save

    room = cache_limit() - sum(array.nbytes for array in arrays.values())
    if room < 0:
        return False
    path = _path(key)
    try:
        entries = []
        for file in path.parent.glob("*.safetensors"):
            with suppress(OSError):  # another process may have deleted it
                state = file.stat()
                entries.append((state.st_mtime_ns, state.st_size, file))
        total = sum(size for _, size, _ in entries)
        for _, size, file in sorted(entries):  # the least recently used first
            if total <= room:
                break
            file.unlink(missing_ok=True)
            total -= size
        dense = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_atomic(path, save(dense))
    except OSError:  # a full or read-only disk does not invalidate the result
        return False
    return True


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.safetensors"
