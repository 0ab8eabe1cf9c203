"""Atomic writes and folder locks: whole files, one writer at a time, across hosts and crashes."""

from __future__ import annotations

import glob
import os
import re
import secrets
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, TextIO, TypeAlias

from lora_analysis.errors import InUseError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Names of temporary files: name of the file, process id, random digits.
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})-[0-9a-f]{8}\.tmp")
# Seconds without a change after which the file of a process that does not run on this host counts
# as abandoned; a live process of another host, which cannot be checked, writes more often.
_ABANDONED = 3600.0
LOCK_NAME: Final = ".lock"
# Seconds between a holder's signs of life, and without one until a holder on another host, which
# cannot be checked, counts as dead.
_RENEWAL: Final = 15.0
_SILENCE: Final = 120.0
# State of a process that has ended, but whose parent has not waited for it.
_ENDED: Final = "ended"

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


class _Holder(NamedTuple):
    """Holder of a lock: process, host, and start of the process (process ids are reused)."""

    pid: str = ""
    host: str = ""
    began: str = ""

    def __str__(self) -> str:
        return f"process {self.pid or 'unknown'} on {self.host or 'an unknown host'}"


@contextmanager
def lock_folder(
    folder: Path, name: str = LOCK_NAME, *, target: Path | None = None
) -> Iterator[None]:
    """Lock a folder against other processes that lock it, by a file that names this process.

    The file of a killed process is taken over: at once if it ran on this host, after two minutes
    without a sign of life if it ran on another. With the default name, temporary files in the
    folder or below are deleted. ``target`` is the path that the error names, the folder by default.

    Raises
    ------
    InUseError
        Another process has the lock, or had it a moment ago on another host.
    """
    lock = folder / name
    with _acquire(lock, target or folder) as stream:
        over = threading.Event()
        threading.Thread(target=_renew, args=(lock, over), daemon=True).start()
        try:
            if name == LOCK_NAME:
                remove_leftovers(folder, below=True)
            yield
        finally:
            over.set()
            if os.name != "posix":
                stream.close()  # an open file cannot be deleted there
            lock.unlink(missing_ok=True)


@contextmanager
def _acquire(lock: Path, target: Path) -> Iterator[TextIO]:
    """Open the lock's file, take the system's lock on it, and write this process into it."""
    while True:
        with _open_lock(lock) as stream:
            if not _try_lock(stream):
                raise _in_use_error(lock, target, _read_holder(stream))
            try:
                is_current = os.path.samestat(os.fstat(stream.fileno()), lock.stat())
            except FileNotFoundError:
                is_current = False
            if not is_current:
                continue  # its holder deleted it after we opened it
            holder = _read_holder(stream)
            if holder.pid and not _is_gone(holder, lock):
                raise _in_use_error(lock, target, holder)
            stream.seek(0)
            stream.truncate()
            stream.write(f"{os.getpid()} {socket.gethostname()} {_start_time(os.getpid())}\n")
            stream.flush()
            yield stream
            return


def _open_lock(lock: Path) -> TextIO:
    """Open the file, created if missing; a symbolic link of its name is not followed."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(lock, flags, 0o666), "r+", encoding="utf-8", errors="replace")


def _try_lock(stream: TextIO) -> bool:
    """Take the system's lock on a file; return False if another process has it.

    The system releases it when the process ends, in any way. If the system or the file system has
    no such locks, the name in the file decides alone.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _read_holder(stream: TextIO) -> _Holder:
    stream.seek(0)
    return _Holder(*stream.read(300).split()[:3])


def _is_gone(holder: _Holder, lock: Path) -> bool:
    """Return True if the process that wrote the file has ended."""
    if holder.host != socket.gethostname():
        return time.time() - lock.stat().st_mtime > _SILENCE
    # On other systems than POSIX, signal 0 ends the process.
    if os.name != "posix" or not holder.pid.isdecimal():
        return False
    try:
        os.kill(int(holder.pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    began = _start_time(int(holder.pid))
    return began == _ENDED or (bool(holder.began) and holder.began != began)


def _start_time(pid: int) -> str:
    """Return the start of a process in the kernel's ticks; empty if it is not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return _ENDED if state in "ZX" else fields[18]


def _renew(lock: Path, over: threading.Event) -> None:
    while not over.wait(_RENEWAL):
        with suppress(OSError):
            os.utime(lock)


def _in_use_error(lock: Path, target: Path, holder: _Holder) -> InUseError:
    message = (
        f"{target} is in use by {holder}. Wait for it, or choose another folder; "
        f"if that process no longer exists, delete {lock}."
    )
    return InUseError(message)
