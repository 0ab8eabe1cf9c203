"""Executors: jobs in, outcomes out, in the order in which the jobs finish.

`SerialExecutor` works in the caller's own process; those of `processes` and `cluster` follow the
same protocol. A `Shard` picks the jobs of one of several machines that do not know of each other.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lora_analysis.errors import InputError, LoraAnalysisError

Job = TypeVar("Job")
Result = TypeVar("Result")

EventHandler = Callable[[Any], None]
# Called with a job, and with the function that sends events to the caller.
Work = Callable[[Job, EventHandler], Result]

# A second failure is not bad luck: the job is reported, and the rest goes on.
MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Job, Result]):
    """Result of a job, or the error of its last attempt.

    An error of another process has the traceback from there as a note.
    """

    job: Job
    result: Result | None
    error: Exception | None
    attempts: int


@dataclass(frozen=True, slots=True)
class Retried(Generic[Job]):
    """Event of the executor itself: a job failed and is tried again."""

    job: Job
    error: Exception


@dataclass(frozen=True, slots=True)
class Failed:
    """An error on its way from the work to the executor."""

    error: Exception


class Executor(Protocol):
    """Runs a function for every job, on this machine or on others."""

    def map(
        self,
        function: Work[Job, Result],
        jobs: Iterable[Job],
        *,
        on_event: EventHandler | None = None,
    ) -> Generator[Outcome[Job, Result], None, None]:
        """Yield the outcome of ``function(job, send_event)`` for every job, as they finish.

        Parameters
        ----------
        function
            A function of a module, or an object that can be pickled: it is sent to other
            processes. It writes what must last to disk, whole or not at all, because it can be
            stopped at any moment and called again.
        jobs
            Values that can be pickled.
        on_event
            Called in this process with every event that the work sends (anything that can be
            pickled), and with :class:`Retried` when a job fails and is tried again.

        Notes
        -----
        A failed job is tried again once, except after an ``InputError``: the same input would
        fail again. When the iterator is closed, or an exception leaves ``on_event``, running work
        is stopped.
        """
        ...


def attempt(function: Work[Job, Result], job: Job, send_event: EventHandler) -> Result | Failed:
    """Return the result of a job, or the error it raised, ready for sending."""
    try:
        return function(job, send_event)
    except Exception as error:  # noqa: BLE001 - handed to the caller as an outcome
        return Failed(make_picklable(error))


def make_picklable(error: Exception) -> Exception:
    """Return an error with its traceback as a note, or its text if it cannot be pickled."""
    noted = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - a foreign exception may do anything in pickling
        error = LoraAnalysisError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the worker:\n{noted}")
    return error


def is_final(error: Exception, attempts: int) -> bool:
    """Return True if a job that failed is not tried again."""
    return attempts >= MAX_ATTEMPTS or isinstance(error, InputError)


def ignore_event(_event: object) -> None:
    """Do nothing with an event."""


def results_in_order(
    outcomes: Generator[Outcome[Job, Result], None, None], jobs: Sequence[Job]
) -> Iterator[Result]:
    """Yield the results in the order of the jobs, which must differ, as soon as they are ready.

    Raises
    ------
    Exception
        The error of the first job that failed.
    """
    done: dict[Job, Result] = {}
    left = iter(jobs)
    following = next(left, None)
    with closing(outcomes):  # a caller that goes away stops the work at once
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
            done[outcome.job] = outcome.result  # type: ignore[assignment]  # it did not fail
            while following in done:
                yield done.pop(following)
                following = next(left, None)


class SerialExecutor:
    """Runs jobs in the caller's own process and thread, in order; nothing is pickled."""

    def map(
        self,
        function: Work[Job, Result],
        jobs: Iterable[Job],
        *,
        on_event: EventHandler | None = None,
    ) -> Generator[Outcome[Job, Result], None, None]:
        """Yield the outcome of every job; see `Executor`."""
        handle = on_event or ignore_event
        caller_errors: list[Exception] = []  # errors of the event handler are not the job's

        def send_event(event: object) -> None:
            try:
                handle(event)
            except Exception as error:
                caller_errors.append(error)
                raise

        for job in jobs:
            outcome = None
            attempts = 0
            while outcome is None:
                attempts += 1
                try:
                    outcome = Outcome(job, function(job, send_event), None, attempts)
                except Exception as error:
                    if error in caller_errors:
                        raise
                    if is_final(error, attempts):
                        outcome = Outcome(job, None, error, attempts)
                    else:
                        handle(Retried(job, error))
            yield outcome


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1: the jobs of one task of a Slurm array.

    Raises
    ------
    InputError
        The index is not from 1 to the count.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            message = (
                f"There is no shard {self.index}/{self.count}: shards are counted from 1. "
                f"In a Slurm array, use --array=1-{max(self.count, 1)}."
            )
            raise InputError(message)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard for a text ``"k/n"``.

        Raises
        ------
        InputError
            The text is not two whole numbers with a slash between.
        """
        index, slash, count = text.partition("/")
        if not slash or not (index.strip().isdecimal() and count.strip().isdecimal()):
            message = f"A shard is k/n, for example 3/8 for the third of eight; found {text!r}."
            raise InputError(message)
        return cls(int(index), int(count))

    def select(self, jobs: Sequence[Job]) -> list[Job]:
        """Return this shard's jobs: every ``count``-th, so that neighbors are spread.

        Selected from all jobs, not from the unfinished ones: if another shard finishes some
        meanwhile, two shards would otherwise take the same job.
        """
        return list(jobs[self.index - 1 :: self.count])
