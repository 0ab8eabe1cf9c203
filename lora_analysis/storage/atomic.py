"""Atomic writes: a file is written whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from lora_analysis.errors import OutputError

# Names of temporary files: name of the file, process id, random digits.
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})-[0-9a-f]{8}\.tmp")
# Seconds without a change after which the file of a process that does not run on this host counts
# as abandoned; a live process of another host, which cannot be checked, writes more often.
_ABANDONED = 3600.0

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Content: TypeAlias = "bytes | Callable[[BinaryIO], None]"


def write_atomic(path: Path, content: Content) -> Path:
    """Write a file so that, whatever happens, its name has the old content or the new.

    The content goes to a temporary file in the same folder, is flushed to the disk, and is renamed
    in one step. The mode follows the umask, as for any new file; a symbolic link at ``path`` is
    replaced, not followed.

    Parameters
    ----------
    path
        The file; its folder is created if it does not exist.
    content
        The bytes, or a function that writes them to a binary stream.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    OutputError
        The disk refused; the message says whether the old file or the new one exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Files of this path whose writers were killed.
    for old in path.parent.glob(f".{glob.escape(path.name[:100])}.*.tmp"):
        if _is_abandoned(old):
            old.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        # Exclusive creation with mode 666 lets the umask decide; tempfile would make it 600.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
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


def _is_abandoned(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if os.name != "posix":  # elsewhere, signal 0 ends the process
        return False
    try:
        if match is None or time.time() - path.lstat().st_mtime < _ABANDONED:
            return False
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # removed meanwhile, or a process of another user
        return False
    return False


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Delete temporary files of killed writers in a folder, or ``below`` it too.

    Only for a process that has the folder locked: files that others are writing would go too.
    """
    for path in (folder.rglob if below else folder.glob)(".*.tmp"):
        if is_leftover(path):
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Return True if a file is a temporary file of `write_atomic`."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, if the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
