"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from lora_analysis.errors import OutputError

# Names of temporary files: of the file, the process, and chance.
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})-[0-9a-f]{8}\.tmp")
# Seconds without a change after which a file of a process that does not run here was left behind;
# a process of another host, of which nobody here can tell, writes more often.
_ABANDONED = 3600.0

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Content: TypeAlias = "bytes | Callable[[BinaryIO], None]"


def write_atomic(path: Path, content: Content) -> Path:
    """Write a file so that, whatever happens, its name leads to the old content or to the new.

    The content goes to a temporary file in the same folder, is flushed to the disk, and takes
    the name in one step. The mode is what the umask gives to any new file; a symbolic link at
    ``path`` is replaced, not followed.

    Parameters
    ----------
    path
        The file; its folder is made where it does not exist.
    content
        The bytes, or a function that writes them to the binary stream it is given.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    OutputError
        The disk refused; the message says whether the old file or the new one is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = _temporary(path)
    try:
        _write(temporary, content)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            message = (
                f"{path} could not be written: {error.strerror or error}. What was there before is "
                "untouched; make room or name another place with -o."
            )
            raise OutputError(message) from error
        raise
    try:
        sync_folder(path.parent)
    except OSError as error:
        message = (
            f"{path} is written, but the disk did not confirm it: {error.strerror or error}. "
            "Write it again."
        )
        raise OutputError(message) from error
    return path


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_abandoned(path: Path) -> None:
    """Delete what writers of this very file left half-written when they were killed."""
    for old in path.parent.glob(f".{glob.escape(path.name[:100])}.*.tmp"):
        if _is_abandoned(old):
            old.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    found = _TEMPORARY.fullmatch(path.name)
    if os.name != "posix":  # there, signal 0 is not a question but ends the process
        return False
    try:
        if found is None or time.time() - path.lstat().st_mtime < _ABANDONED:
            return False
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # gone meanwhile, or somebody else's process
        return False
    return False


def _write(temporary: Path, content: Content) -> None:
    """Write a new file down to the disk."""
    # Exclusive creation with mode 666 lets the umask decide; tempfile would make it 600.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    with os.fdopen(descriptor, "wb") as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Delete what writers that were killed left half-written in a folder, or ``below`` it too.

    For whoever has the folder to itself: what others are writing would go too.
    """
    for path in (folder.rglob if below else folder.glob)(".*.tmp"):
        if is_leftover(path):
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Return whether a file is what a writer that was killed left half-written."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
