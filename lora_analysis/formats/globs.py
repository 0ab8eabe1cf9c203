"""Patterns of paths, for shells that do not expand them and for sources named in Python."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import SourceError
from lora_analysis.patterns import natural_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lora_analysis.formats.sources import AdapterRef

# What a sweep leaves beside its runs, and a shell's ``runs/*`` names too.
_BESIDE_RUNS: Final = frozenset({"sweep.json", "failed.json"})


def expanded(source: str) -> list[str]:
    """Return the paths a glob means, in natural order; any other source as it is.

    ``**`` goes through folders. A path that exists as it is written is no glob. The notes of a
    sweep among its runs are passed over.

    Raises
    ------
    SourceError
        No path fits the glob.
    """
    if not glob.has_magic(source) or "://" in source or Path(source).exists():
        return [] if Path(source).name in _BESIDE_RUNS else [source]
    found = sorted(glob.glob(source, recursive=True), key=natural_key)  # noqa: PTH207 - any root
    found = [one for one in found if Path(one).name not in _BESIDE_RUNS]
    if not found:
        message = f"No file or folder fits '{source}'. Is the pattern right, and the folder?"
        raise SourceError(message)
    return found


def each_once(
    found: Iterable[AdapterRef], known: set[tuple[str, str | None]]
) -> Iterator[AdapterRef]:
    """Yield what is not ``known`` yet, and note it: a folder and one inside it may be named."""
    for ref in found:
        key = (os.path.abspath(ref.path), ref.name)  # noqa: PTH100 - a link is a name of its own
        if key not in known:
            known.add(key)
            yield ref
