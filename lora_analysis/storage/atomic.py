"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


Content = bytes | Callable[[BinaryIO], None]


def write_atomic(path: Path, content: Content) -> Path:
    """Write a file so that, whatever happens, its name leads to the old content or to the new.

    The content goes to a temporary file in the same folder, is flushed to the disk, and takes
    the name in one step. The mode is what the umask gives to any new file; a symbolic link at
    ``path`` is replaced, not followed.

    Parameters
    ----------
    path
        The file; its folder must exist.
    content
        The bytes, or a function that writes them to the binary stream it is given.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    OSError
        The disk refused; the old file is untouched and the temporary one removed.
    """
    return write_together({path: content})


def write_together(files: Mapping[Path, Content]) -> Path:
    """Write files of one folder that only mean something together, as weights and their config.

    All are on the disk before the first takes its name. Old files of the other names are taken
    away just before: whenever the process is killed, nothing old lies beside anything new.

    Parameters
    ----------
    files
        Each file and its content, as in `write_atomic`; the first is the one that may stand alone.

    Returns
    -------
    Path
        The first file.

    Raises
    ------
    OSError
        The disk refused; the old files are untouched and the temporary ones removed.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            temporaries[path] = path.with_name(
                f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            )
            _write(temporaries[path], content)
        first, *others = files
        for path in others:
            path.unlink(missing_ok=True)
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(first.parent)
    return first


def _write(path: Path, content: Content) -> None:
    # Exclusive creation with mode 666 lets the umask decide; tempfile would make it 600.
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    with os.fdopen(descriptor, "wb") as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
