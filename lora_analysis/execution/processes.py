"""Worker processes on this machine, each fed over a pipe, one cell after the other."""

from __future__ import annotations

import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Generic

from lora_analysis.errors import InputError, LostWorkerError, UnguardedScriptError
from lora_analysis.execution.protocol import (
    Cell,
    Failed,
    Outcome,
    Result,
    Retried,
    Tell,
    Work,
    is_final,
)
from lora_analysis.execution.worker import (
    UNGUARDED,
    WORKER_NAME,
    Done,
    Ready,
    end_if_imported_by_worker,
    run_worker,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

_PATIENCE = 5.0  # seconds a worker is given to end when it is asked to
# Forked children would inherit locks of torch's and BLAS's threads, without the threads.
_CONTEXT = multiprocessing.get_context("spawn")


class _Lost(Failed):
    """The worker is gone."""


@dataclass(slots=True, eq=False)
class _Worker(Generic[Cell]):
    """A process, our end of its pipe, and the cell it is at, with the number of the attempt."""

    process: SpawnProcess
    pipe: Connection[Any, Any]
    environment: Mapping[str, str]
    cell: Cell | None = None
    attempts: int = 0
    ready: bool = False

    @property
    def busy(self) -> bool:
        return self.attempts > 0

    def give(self, cell: Cell, attempts: int) -> None:
        self.cell, self.attempts = cell, attempts
        with suppress(ConnectionError):  # it is gone, and its pipe will say so
            self.pipe.send(cell)

    def release(self) -> tuple[Cell, int]:
        """Take the cell back, with the number of the attempt."""
        cell, attempts = self.cell, self.attempts
        self.cell, self.attempts = None, 0
        return cell, attempts  # type: ignore[return-value]  # a busy worker has one

    def receive(self) -> object:
        """Return what the worker sends, or that it is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(_PATIENCE)
            if not self.ready and (self.process.exitcode or 0) > 0:
                raise _not_started(self.process.exitcode) from None
            message = (
                f"The worker process {self.process.pid} ended with exit code "
                f"{self.process.exitcode} before {self.cell} was done. Was it killed for want of "
                "memory? Use fewer workers if it recurs."
            )
            return _Lost(LostWorkerError(message))


class ProcessExecutor:
    """Work in processes started afresh, so that none can take another or the caller down.

    Parameters
    ----------
    workers
        How many processes work side by side.
    threads
        CPU threads of each: one, so that sums come out in one order whatever else runs.
    environments
        Variables set in each worker before it computes, dealt in turn: where there are several
        GPUs, ``CUDA_VISIBLE_DEVICES`` gives one to each.

    Raises
    ------
    InputError
        Fewer than one worker. When the work begins, if no worker can import the main module.
    UnguardedScriptError
        When the work begins, if the main module starts workers itself when it is imported.

    Notes
    -----
    Workers import the caller's main module anew, so a script must guard its own start with
    ``if __name__ == "__main__"``. What they print goes to stderr. They end with the caller,
    even where that is killed.
    """

    def __init__(
        self,
        workers: int,
        *,
        threads: int = 1,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        end_if_imported_by_worker()
        if workers < 1:
            message = f"workers must be at least 1, found {workers}."
            raise InputError(message)
        self.workers = workers
        self.threads = threads
        self.environments = environments or [{}]

    def map(
        self, function: Work[Cell, Result], cells: Iterable[Cell], *, tell: Tell | None = None
    ) -> Generator[Outcome[Cell, Result], None, None]:
        """Yield the outcome of every cell; see `protocol.Executor`."""
        waiting = deque((cell, 1) for cell in cells)
        start = partial(_start, bytes(ForkingPickler.dumps(function)), self.threads)
        crew: list[_Worker[Cell]] = []
        try:
            environments = islice(cycle(self.environments), min(self.workers, len(waiting)))
            crew.extend(start(environment) for environment in environments)
            yield from _outcomes(crew, waiting, start, tell or _ignore)
            for worker in crew:
                worker.pipe.close()  # nothing is left to do
            for worker in crew:
                worker.process.join(_PATIENCE)
        finally:
            _end(crew)


def _outcomes(
    crew: list[_Worker[Cell]],
    waiting: deque[tuple[Cell, int]],
    start: Callable[[Mapping[str, str]], _Worker[Cell]],
    tell: Tell,
) -> Iterator[Outcome[Cell, Any]]:
    """Keep every worker busy, and put a new one where one is lost, until nothing is left."""
    while waiting or any(worker.busy for worker in crew):
        for worker in crew:
            if waiting and not worker.busy:
                worker.give(*waiting.popleft())
        ready = wait([worker.pipe for worker in crew if worker.busy])
        for at in [at for at, worker in enumerate(crew) if worker.pipe in ready]:
            message = crew[at].receive()
            if isinstance(message, Ready):
                crew[at].ready = True
                continue
            if not isinstance(message, Done | Failed):
                tell(message)
                continue
            cell, attempts = crew[at].release()
            if isinstance(message, _Lost):
                crew[at].pipe.close()
                crew[at] = start(crew[at].environment)
            if isinstance(message, Done):
                yield Outcome(cell, message.result, None, attempts)
            elif is_final(message.error, attempts):
                yield Outcome(cell, None, message.error, attempts)
            else:
                waiting.append((cell, attempts + 1))
                tell(Retried(cell, message.error))


def _start(work: bytes, threads: int, environment: Mapping[str, str]) -> _Worker[Any]:
    ours, theirs = _CONTEXT.Pipe()
    arguments = (theirs, work, threads, dict(environment))
    process = _CONTEXT.Process(target=run_worker, name=WORKER_NAME, args=arguments, daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, environment)


def _not_started(exit_code: int | None) -> InputError:
    """Return why a worker ended while it imported the main module, as every other one would."""
    script = getattr(sys.modules["__main__"], "__file__", None) or "the main module"
    guard = 'under `if __name__ == "__main__":`'
    if exit_code == UNGUARDED:
        return UnguardedScriptError(
            f"{script} starts worker processes, which import it and would start their own: put the "
            f"call {guard}, or use one worker (workers=1)."
        )
    return InputError(
        f"Worker processes cannot import {script} (exit code {exit_code}; their error is above): "
        f"put what it does {guard}, or use one worker (workers=1)."
    )


def _end(crew: Sequence[_Worker[Any]]) -> None:
    """Stop what still runs: first asked, so that it can give up its locks, then made to."""
    for worker in crew:
        worker.process.terminate()
    for worker in crew:
        worker.process.join(_PATIENCE)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


def _ignore(_event: object) -> None:
    """Watch nothing."""
