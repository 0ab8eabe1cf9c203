"""File operations that fail: the n-th of a block, by an error of the system or a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "fdopen", "mkdir", "replace", "rename", "unlink", "rmdir", "fsync")
ERRORS = {
    "kill": None,
    "ENOSPC": OSError(28, "No space left on device"),
    "EIO": OSError(5, "Input/output error"),
    "EACCES": OSError(13, "Permission denied"),
}


class Killed(BaseException):
    """The process ends here: nothing that follows may run, not even clean-up."""


class Faults:
    """Counts file operations and fails at a chosen one; a kill fails at all that follow too."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.error: BaseException | None = None
        self.seen = 0

    def before(self, root: Path, arguments: tuple[Any, ...]) -> None:
        """Raise if it is the turn of this operation; only what happens below a folder counts."""
        if self.left is None or not _concerns(root, arguments):
            return
        self.seen += 1
        self.left -= 1
        killed = self.error is None
        if self.left == 0 or (self.left < 0 and killed):
            raise Killed if killed else self.error  # type: ignore[misc]  # an error, or the class

    @property
    def reached(self) -> bool:
        """Whether the operation that was to fail has come."""
        return self.left is not None and self.left <= 0


def _concerns(root: Path, arguments: tuple[Any, ...]) -> bool:
    path = arguments[0] if arguments else None
    if isinstance(path, int):
        with suppress(OSError):
            path = Path(f"/proc/self/fd/{path}").readlink()
    return isinstance(path, str | os.PathLike) and root in Path(path).parents


@contextmanager
def faulty(root: Path, number: int, error: OSError | None) -> Iterator[Faults]:
    """Let the file operation of that number below a folder fail; None kills the process there.

    Flushing to the disk is left out, which takes most of the time and changes nothing here.
    """
    faults = Faults()
    real = {name: getattr(os, name) for name in OPERATIONS}

    def wrap(name: str) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            faults.before(root, args)
            return None if name == "fsync" else real[name](*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrap(name))
    faults.left, faults.error = number, error
    try:
        yield faults
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def release_locks(root: Path) -> None:
    """Delete locks, which go with a killed process that here lives on."""
    for lock in (*root.rglob("*.lock"), *root.rglob(".*.lock")):
        lock.unlink(missing_ok=True)
