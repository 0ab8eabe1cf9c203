"""Where a source string leads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_analysis.errors import SourceError

if TYPE_CHECKING:
    import os


def existing_path(source: str | os.PathLike[str]) -> Path | None:
    """Return the local path that ``source`` spells, None where nothing lies there."""
    try:
        path = Path(source)
        return path if path.exists() else None
    except (OSError, ValueError):  # a name too long, or with a null character in it
        return None


def nothing_there(source: str | os.PathLike[str]) -> SourceError:
    """Return the error for a source that leads nowhere."""
    return SourceError(f"There is no file or folder {str(source)!r}.")
