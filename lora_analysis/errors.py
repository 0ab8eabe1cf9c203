"""Everything the package raises on purpose.

::

    LoraAnalysisError
    ├── InputError (ValueError)          what was given cannot be used; exit code 3
    │   ├── MalformedFileError           a file is not what its format says
    │   ├── UnknownFormatError           no reader recognises the source
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
    │   └── DivergedError                training whose loss is no longer finite
    ├── LostWorkerError                  the process that did the work ended before it was done
    ├── OutputError (OSError)            a file could not be written; what was there still is
    └── MissingExtraError (ImportError)  an optional dependency is not installed

A message says what was asked, what was found (with names and numbers), and the likely cause or
next step.
"""


class LoraAnalysisError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(LoraAnalysisError, ValueError):
    """What was given cannot be used; the message says why and what to do next."""


class MalformedFileError(InputError):
    """A file does not hold what its format promises."""


class UnknownFormatError(InputError):
    """No reader recognises the source."""


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


class OutputError(LoraAnalysisError, OSError):
    """A file could not be written: a full disk, a folder that may not be written to."""


class MissingExtraError(LoraAnalysisError, ImportError):
    """An optional dependency is needed and not installed."""
