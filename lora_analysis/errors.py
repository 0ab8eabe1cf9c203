"""The errors that the package raises on purpose.

::

    LoraAnalysisError
    ├── InputError (ValueError)          the input cannot be used; exit code 3
    │   ├── MalformedFileError           a file violates its format
    │   ├── UnknownFormatError           no reader recognizes the source
    │   ├── UnsupportedMethodError       an adapter, but its update is not s·B·A
    │   ├── SourceError                  no adapter at the source, or more than one
    │   ├── ScaleError                   the scale of the update is unknown
    │   ├── BaseWeightError              no unique, fitting base tensor for a module
    │   ├── IncompatibleError            two values that cannot be compared or combined
    │   ├── DegenerateSubspaceError      a subspace that the numbers do not define
    │   ├── TargetError                  no module to adapt, or one that cannot be adapted
    │   ├── InUseError                   another process is working in the folder
    │   ├── OccupiedError                the output has files that may not be replaced
    │   ├── UnfinishedError              files that this package has not finished writing
    │   ├── DivergedError                training whose loss is no longer finite
    │   └── UnguardedScriptError (SystemExit)  a script that its own worker processes would run
    ├── LostWorkerError                  a worker process ended before its work was done
    ├── OutputError (OSError)            a file could not be written; the old one is unchanged
    ├── OutOfMemoryError (MemoryError)   the work needs more memory than is available
    └── MissingExtraError (ImportError)  an optional dependency is not installed

A message states what was asked, what was found (with names and numbers), and the likely cause or
next step.
"""

from __future__ import annotations

import errno
import importlib.util
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class LoraAnalysisError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(LoraAnalysisError, ValueError):
    """The input cannot be used; the message states why and what to do next."""


class MalformedFileError(InputError):
    """A file violates its format."""


class UnknownFormatError(InputError):
    """No reader recognizes the source."""


class UnsupportedMethodError(InputError):
    """The source is an adapter whose update is not ``s·B·A``."""


class SourceError(InputError):
    """The source has no adapter, or several if one was requested."""


class ScaleError(InputError):
    """The requested number depends on the scale, which is unknown."""


class BaseWeightError(InputError):
    """The base has no unique tensor of a fitting shape for the module."""


class IncompatibleError(InputError):
    """Two updates, or an update and a weight, have different module shapes."""


class DegenerateSubspaceError(InputError):
    """The requested subspace is not defined by the numbers (beyond the numerical rank)."""


class TargetError(InputError):
    """The targets name no module of the model, or one that LoRA cannot adapt."""


class InUseError(InputError):
    """Another process is working in the folder."""


class OccupiedError(InputError):
    """The output has files that may not be replaced, or is an input."""


class UnfinishedError(InputError):
    """Files at a source that this package has not finished writing."""


class LostWorkerError(LoraAnalysisError):
    """A worker process ended before its work was done."""


class DivergedError(InputError):
    """The loss or the gradient of a training is no longer finite."""


class UnguardedScriptError(InputError, SystemExit):
    """A script starts worker processes outside ``if __name__ == "__main__"``.

    If it is not caught, the script ends with its message and exit code 1, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message


class OutputError(LoraAnalysisError, OSError):
    """The system refused to write a file: a full disk, a read-only folder."""


class OutOfMemoryError(LoraAnalysisError, MemoryError):
    """The work needs more memory than the machine or its limit allows."""


class MissingExtraError(LoraAnalysisError, ImportError):
    """An optional dependency is needed and not installed."""


def require_package(module: str, extra: str, purpose: str, *, package: str | None = None) -> None:
    """Raise unless an optional package is installed.

    Parameters
    ----------
    module
        Name of its top-level module.
    extra
        Extra of this package that installs it.
    purpose
        Beginning of the message: "Training".
    package
        Name under which it is installed, if it is not the module's.

    Raises
    ------
    MissingExtraError
        The module cannot be found.
    """
    try:
        present = bool(sys.modules.get(module) or importlib.util.find_spec(module))
    except (ImportError, ValueError):
        present = False
    if not present:
        message = (
            f"{purpose} needs {package or module}, which is not installed. "
            f"Run: pip install 'lora-analysis[{extra}]'"
        )
        raise MissingExtraError(message)


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


def named_error(error: BaseException, subject: str) -> LoraAnalysisError | None:
    """Return the error of this package for a system error, with a message that names its subject.

    Parameters
    ----------
    error
        An error of memory, recursion or the operating system.
    subject
        The file, folder or command that was being processed.

    Returns
    -------
    LoraAnalysisError or None
        None for every other type of error, and for those that this package raises itself.
    """
    if isinstance(error, LoraAnalysisError):
        return None
    # torch's error for a device is a RuntimeError of this name.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(
            f"{subject}: memory ran out. Use fewer workers or smaller inputs, or a machine with "
            "more memory."
        )
    if isinstance(error, RecursionError):
        return MalformedFileError(f"{subject}: something in it is nested too deeply to be read.")
    if isinstance(error, OSError):
        path = subject if error.filename is None else str(error.filename)
        if error.errno in _DISK_FULL:
            return OutputError(
                f"{path}: {error.strerror}. Make room, or name a folder on another disk."
            )
        return OutputError(f"{path}: {error.strerror or error}.")
    return None


@contextmanager
def named_errors(subject: str) -> Iterator[None]:
    """Raise system errors as errors of this package, see `named_error`."""
    try:
        yield
    except Exception as error:
        named = named_error(error, subject)
        if named is None:
            raise
        raise named from error
