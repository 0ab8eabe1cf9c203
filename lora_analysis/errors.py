"""Everything the package raises on purpose.

::

    LoraAnalysisError
    ├── InputError (ValueError)          what was given cannot be used; exit code 3
    │   ├── MalformedFileError           a file is not what its format says
    │   ├── UnknownFormatError           no reader recognizes the source
    │   ├── UnsupportedMethodError       an adapter, but its update is not s·B·A
    │   ├── SourceError                  no adapter at the source, or more than one
    │   ├── ScaleError                   the multiplier of the update is not known
    │   ├── BaseWeightError              no unique, fitting base tensor for a module
    │   ├── IncompatibleError            two things that cannot be held against each other
    │   ├── DegenerateSubspaceError      a subspace that the numbers do not define
    │   ├── TargetError                  no module to adapt, or one that cannot be
    │   ├── InUseError                   another process is at work there
    │   ├── OccupiedError                something lies at the output that may not be replaced
    │   ├── UnfinishedError              files that this package has not finished writing
    │   ├── DivergedError                training whose loss is no longer finite
    │   └── UnguardedScriptError (SystemExit)  a script that its own worker processes would run
    ├── LostWorkerError                  the process that did the work ended before it was done
    ├── OutputError (OSError)            a file could not be written; what was there still is
    ├── OutOfMemoryError (MemoryError)   the work needs more memory than there is
    └── MissingExtraError (ImportError)  an optional dependency is not installed

A message says what was asked, what was found (with names and numbers), and the likely cause or
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
    """What was given cannot be used; the message says why and what to do next."""


class MalformedFileError(InputError):
    """A file does not hold what its format promises."""


class UnknownFormatError(InputError):
    """No reader recognizes the source."""


class UnsupportedMethodError(InputError):
    """The source holds an adapter whose update is not ``s·B·A``."""


class SourceError(InputError):
    """The source holds no adapter, or several where one was asked for."""


class ScaleError(InputError):
    """A number was asked for that needs the scale, and the scale is not known."""


class BaseWeightError(InputError):
    """No unique base tensor of a fitting shape belongs to the module."""


class IncompatibleError(InputError):
    """Two updates, or an update and a weight, do not belong to the same module shape."""


class DegenerateSubspaceError(InputError):
    """The requested subspace is not defined by the numbers (beyond the numerical rank)."""


class TargetError(InputError):
    """The targets name no module of the model, or one that LoRA cannot adapt."""


class InUseError(InputError):
    """Another process is at work in the folder."""


class OccupiedError(InputError):
    """Something lies at the output that may not be replaced, or the output is an input."""


class UnfinishedError(InputError):
    """The files at a source are in the middle of being written by this package."""


class LostWorkerError(LoraAnalysisError):
    """The process that did a piece of work ended before the work was done."""


class DivergedError(InputError):
    """The loss or the gradient of a training is no longer finite."""


class UnguardedScriptError(InputError, SystemExit):
    """A script starts worker processes outside ``if __name__ == "__main__"``.

    Uncaught, it ends the script with its sentence and exit code 1, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message


class OutputError(LoraAnalysisError, OSError):
    """The system refused a file: a full disk, a folder that may not be written to."""


class OutOfMemoryError(LoraAnalysisError, MemoryError):
    """The work needs more memory than this machine, or its limit, has."""


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
    """Return what an error of the machine means for a subject, as an error of this package.

    Parameters
    ----------
    error
        Memory that ran out, recursion that is too deep, or a refusal of the operating system.
    subject
        What was being worked on: the file, folder or command.

    Returns
    -------
    LoraAnalysisError or None
        None for any other error, and for those that this package raises itself.
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
        where = subject if error.filename is None else str(error.filename)
        if error.errno in _DISK_FULL:
            return OutputError(
                f"{where}: {error.strerror}. Make room, or name a folder on another disk."
            )
        return OutputError(f"{where}: {error.strerror or error}.")
    return None


@contextmanager
def named_errors(subject: str) -> Iterator[None]:
    """Raise errors of the machine as what they mean for a subject, see `named_error`."""
    try:
        yield
    except Exception as error:
        named = named_error(error, subject)
        if named is None:
            raise
        raise named from error
