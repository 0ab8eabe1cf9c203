"""Where a source string leads."""

from __future__ import annotations

import os
from pathlib import Path

from lora_analysis.errors import SourceError

_CONFIGS = ("config.json", "adapter_config.json")


def existing_path(source: str | os.PathLike[str]) -> Path | None:
    """Return the local path that ``source`` spells, None where nothing lies there."""
    try:
        path = Path(source)
        return path if path.exists() else None
    except (OSError, ValueError):  # a name too long, or with a null character in it
        return None


def source_paths(source: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the local files and folders of a model or adapter, which no output may touch.

    A file next to its config is part of that folder. ``()`` if nothing local has the name.
    """
    path = existing_path(source)
    if path is None or not os.fspath(source):
        return ()
    configured = path.is_file() and any(path.with_name(name).is_file() for name in _CONFIGS)
    return (path, path.parent) if configured else (path,)


def nothing_there(source: str | os.PathLike[str]) -> SourceError:
    """Return the error for a source that leads nowhere."""
    return SourceError(f"There is no file or folder {str(source)!r}.")
