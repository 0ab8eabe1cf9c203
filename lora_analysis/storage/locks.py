"""Folder locks: one process at a time, across hosts and after crashes."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from lora_analysis.errors import InUseError
from lora_analysis.storage.atomic import remove_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

LOCK_NAME: Final = ".lock"
# Seconds between a holder's signs of life, and without one until a holder on another host, which
# cannot be checked, counts as dead.
_RENEWAL: Final = 15.0
_SILENCE: Final = 120.0
# State of a process that has ended, but whose parent has not waited for it.
_ENDED: Final = "ended"


class _Holder(NamedTuple):
    """Holder of a lock: process, host, and start of the process (process ids are reused)."""

    pid: str = ""
    host: str = ""
    began: str = ""

    def __str__(self) -> str:
        return f"process {self.pid or 'unknown'} on {self.host or 'an unknown host'}"


@contextmanager
def locked(folder: Path, name: str = LOCK_NAME, *, target: Path | None = None) -> Iterator[None]:
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
    with _acquired(lock, target or folder) as stream:
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
def _acquired(lock: Path, target: Path) -> Iterator[TextIO]:
    """Open the lock's file, take the system's lock on it, and write this process into it."""
    while True:
        with _opened(lock) as stream:
            if not _hold(stream):
                raise _in_use(lock, target, _read_holder(stream))
            if not _is_at(stream, lock):
                continue  # its holder deleted it after we opened it
            holder = _read_holder(stream)
            if holder.pid and not _is_gone(holder, lock):
                raise _in_use(lock, target, holder)
            stream.seek(0)
            stream.truncate()
            stream.write(f"{os.getpid()} {socket.gethostname()} {_began(os.getpid())}\n")
            stream.flush()
            yield stream
            return


def _opened(lock: Path) -> TextIO:
    """Open the file, created if missing; a symbolic link of its name is not followed."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(lock, flags, 0o666), "r+", encoding="utf-8", errors="replace")


def _hold(stream: TextIO) -> bool:
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


def _is_at(stream: TextIO, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), lock.stat())
    except FileNotFoundError:
        return False


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
    began = _began(int(holder.pid))
    return began == _ENDED or (bool(holder.began) and holder.began != began)


def _began(pid: int) -> str:
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


def _in_use(lock: Path, target: Path, holder: _Holder) -> InUseError:
    message = (
        f"{target} is in use by {holder}. Wait for it, or choose another folder; "
        f"if that process no longer exists, delete {lock}."
    )
    return InUseError(message)
