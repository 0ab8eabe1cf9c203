"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from typing import TYPE_CHECKING, BinaryIO

# Names of temporary files: of the file, the process, and chance.
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], None]) -> Path:
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
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # Exclusive creation with mode 666 lets the umask decide; tempfile would make it 600.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Delete what writers that were killed left half-written in a folder, or ``below`` it too.

    For whoever has the folder to itself: what others are writing would go too.
    """
    for path in (folder.rglob if below else folder.glob)(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
