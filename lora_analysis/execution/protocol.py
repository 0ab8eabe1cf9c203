"""What every executor does: cells in, outcomes out, in the order in which they are done."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lora_analysis.errors import InputError, LoraAnalysisError

Cell = TypeVar("Cell")
Result = TypeVar("Result")

Tell = Callable[[Any], None]
# Called with a cell, and with what tells the caller how far it is.
Work = Callable[[Cell, Tell], Result]

# A second failure is not bad luck; the cell is reported, and the rest goes on.
MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Cell, Result]):
    """How a cell ended: with a result, or with the error of its last attempt.

    An error of another process has the traceback from there as a note.
    """

    cell: Cell
    result: Result | None
    error: Exception | None
    attempts: int


@dataclass(frozen=True, slots=True)
class Retried(Generic[Cell]):
    """Told among the events of the work itself: a cell failed and is tried again."""

    cell: Cell
    error: Exception


class Executor(Protocol):
    """Does a piece of work for every cell, somewhere."""

    def map(
        self, function: Work[Cell, Result], cells: Iterable[Cell], *, tell: Tell | None = None
    ) -> Generator[Outcome[Cell, Result], None, None]:
        """Yield the outcome of ``function(cell, tell)`` for every cell, as they come.

        Parameters
        ----------
        function
            A function of a module, or an object that pickles: other processes are sent it. It
            writes what must last to disk, whole or not at all, because it may be stopped at any
            moment and called again.
        cells
            Values that pickle.
        tell
            Called in this process with what the work tells (anything that pickles), and with
            :class:`Retried` where a cell fails and is tried again.

        Notes
        -----
        A cell is tried again once, except where it raised an ``InputError``: what was given will
        be no better. Where the iterator is closed, or an exception leaves ``tell``, work that is
        under way is stopped.
        """
        ...


def attempt(function: Work[Cell, Result], cell: Cell, tell: Tell) -> Result | Failed:
    """Return what the function makes of a cell, or the error it raised, fit for sending."""
    try:
        return function(cell, tell)
    except Exception as error:  # noqa: BLE001 - handed to the caller as an outcome
        return Failed(sendable(error))


@dataclass(frozen=True, slots=True)
class Failed:
    """An error on its way from the work to the executor."""

    error: Exception


def sendable(error: Exception) -> Exception:
    """Return an error with its traceback as a note, or its text where it does not pickle."""
    noted = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - what a foreign exception does in pickling is unknown
        error = LoraAnalysisError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the worker:\n{noted}")
    return error


def is_final(error: Exception, attempts: int) -> bool:
    """Say whether a cell that failed is not tried again."""
    return attempts >= MAX_ATTEMPTS or isinstance(error, InputError)


def results_in_order(
    outcomes: Generator[Outcome[Cell, Result], None, None], cells: Sequence[Cell]
) -> Iterator[Result]:
    """Yield the results in the order of the cells, which must differ, whatever order they come in.

    Raises
    ------
    Exception
        The error of the first cell that failed.
    """
    done: dict[Cell, Result] = {}
    left = iter(cells)
    wanted = next(left, None)
    with closing(outcomes):  # a caller that goes away stops the work at once
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
            done[outcome.cell] = outcome.result  # type: ignore[assignment]  # it did not fail
            while wanted in done:
                yield done.pop(wanted)
                wanted = next(left, None)
