"""One process at a time in a folder."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_NAME: Final = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, by a file that names this one.

    A file that a process of this host left when it was killed is taken over.

    Raises
    ------
    InputError
        Another process is in the folder, or was on another host, of which nobody can tell.
    """
    lock = folder / LOCK_NAME
    if lock.is_file() and _is_stale(lock):
        lock.unlink(missing_ok=True)
    try:
        with lock.open("x", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()} {socket.gethostname()}\n")
    except FileExistsError as error:
        pid, host = _holder(lock)
        message = (
            f"{folder} is in use by process {pid} on {host}. Wait for it, or take another folder; "
            f"if there is no such process any more, delete {lock}."
        )
        raise InputError(message) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _holder(lock: Path) -> tuple[str, str]:
    """Return process and host as the file has them, both unknown where it has not."""
    try:
        pid, _, host = lock.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
    except OSError:
        pid = host = ""
    return pid or "unknown", host or "an unknown host"


def _is_stale(lock: Path) -> bool:
    """Say whether the file was left by a process of this host that is gone."""
    pid, host = _holder(lock)
    # Elsewhere than on POSIX systems, signal 0 is not a question but ends the process.
    if os.name != "posix" or host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False
