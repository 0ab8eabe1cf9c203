"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import secrets
import time
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from lora_analysis.errors import OutputError

# Names of temporary files: of the file, the process, and chance.
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})-[0-9a-f]{8}\.tmp")
# Seconds without a change after which a file of a process that does not run here was left behind;
# a process of another host, of which nobody here can tell, writes more often.
_ABANDONED = 3600.0

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
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
        The disk refused; the old file is untouched and the temporary one removed.
    """
    return write_together({path: content})


def write_together(contents: Mapping[Path, Content]) -> Path:
    """Write files that mean nothing without each other, as weights and what scales them.

    Each is written as by `write_atomic`, all of them before the first takes its name. The last
    one is the mark that the rest is whole: of an older set it goes first and comes back last, so
    that whoever is interrupted leaves the old set, the new one, or one that lacks its mark, and
    never a mixture that could be taken for either.

    Parameters
    ----------
    contents
        What to write by file, the mark last.

    Returns
    -------
    Path
        The mark.

    Raises
    ------
    OutputError
        The disk refused; the old files are untouched and the temporary ones removed. Where it
        refused after the first had its name, the message says so, and the mark is missing.
    """
    *parts, mark = contents
    temporaries: dict[Path, Path] = {}
    aside = _temporary(mark)
    renamed: list[Path] = []
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            temporaries[path] = _temporary(path)
            _write(temporaries[path], content)
        if parts and os.path.lexists(mark):
            mark.replace(aside)
        for path, temporary in temporaries.items():
            temporary.replace(path)
            renamed.append(path)
    except BaseException as error:
        if not renamed and os.path.lexists(aside):
            aside.replace(mark)
        for temporary in (*temporaries.values(), *([aside] if renamed else [])):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refused(mark, error, renamed) from error
        raise
    aside.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        sync_folder(folder)
    return mark


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


def _refused(path: Path, error: OSError, renamed: Sequence[Path] = ()) -> OutputError:
    reason = error.strerror or str(error)
    if renamed:
        return OutputError(
            f"{path} could not be written: {reason}. {renamed[0]} is new and stands without it; "
            "write both again."
        )
    return OutputError(
        f"{path} could not be written: {reason}. What was there before is untouched; make room "
        "or name another place with -o."
    )


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
