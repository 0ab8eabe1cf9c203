"""Local paths: what a source string names, and the files shipped with the package."""

from __future__ import annotations

import os
from pathlib import Path

from lora_analysis.errors import SourceError

_CONFIGS = ("config.json", "adapter_config.json")
_PACKAGE = Path(__file__).resolve().parents[1]


def existing_path(source: str | os.PathLike[str]) -> Path | None:
    """Return the local path that ``source`` names, None if it does not exist."""
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
    """Return the error for a source that names no file or folder."""
    return SourceError(f"There is no file or folder {str(source)!r}.")


def bundled_data(name: str) -> Path:
    """Return the path of a shipped file or folder.

    An installed package has them in ``lora_analysis/data``; a checkout has them in ``data/`` at its
    root.

    Parameters
    ----------
    name
        Name inside the data folder, for example ``"digits-vit"``.

    Raises
    ------
    SourceError
        Nothing of that name is shipped.
    """
    folders = [_PACKAGE / "data", _PACKAGE.parent / "data"]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    searched = " or ".join(str(folder) for folder in folders)
    message = f"No bundled data named '{name}' in {searched}. Is the installation complete?"
    raise SourceError(message)
