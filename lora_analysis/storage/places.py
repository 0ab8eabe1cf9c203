"""Where a source string leads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import SourceError

if TYPE_CHECKING:
    import os

_REPOSITORY: Final = re.compile(r"(hf://)?[\w.-]+/[\w.-]+(@[\w.-]+)?(/.+)?")


def existing_path(source: str | os.PathLike[str]) -> Path | None:
    """Return the local path that ``source`` spells, None where nothing lies there."""
    try:
        path = Path(source)
        return path if path.exists() else None
    except (OSError, ValueError):  # a name too long, or with a null character in it
        return None


def nothing_there(source: str | os.PathLike[str]) -> SourceError:
    """Return the error for a source that leads nowhere."""
    message = f"There is no file or folder {str(source)!r}."
    if _REPOSITORY.fullmatch(str(source)):
        message += " If it names a repository on a hub: download it and pass the local folder."
    return SourceError(message)
