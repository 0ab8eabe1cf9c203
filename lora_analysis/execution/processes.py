"""Worker processes on this machine: jobs go in over a pipe, events and outcomes come back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Generic, cast

from lora_analysis.errors import InputError, LostWorkerError, UnguardedScriptError
from lora_analysis.execution.protocol import (
    EventHandler,
    Failed,
    Job,
    Outcome,
    Result,
    Retried,
    Work,
    attempt,
    ignore_event,
    is_final,
    make_picklable,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    Pipe = Connection[Any, Any]

_PATIENCE = 5.0  # seconds that a worker has to end when it is asked to
# Forked children would inherit locks of torch's and BLAS's threads, without the threads.
_CONTEXT = multiprocessing.get_context("spawn")
_WORKER_NAME = "lora-analysis worker"
_UNGUARDED = 87  # exit code of a worker whose main module starts workers itself
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class ProcessExecutor:
    """Runs jobs in fresh processes, so that none can take another or the caller down.

    Parameters
    ----------
    workers
        Number of processes that work in parallel.
    threads
        CPU threads of each: 1, so that the order of sums does not depend on what else runs.
    environments
        Variables to set in each worker before it computes, assigned in turn: with several GPUs,
        ``CUDA_VISIBLE_DEVICES`` gives one to each.

    Raises
    ------
    InputError
        Fewer than one worker. When the work begins: no worker can import the main module.
    UnguardedScriptError
        When the work begins: the main module itself starts workers when it is imported.

    Notes
    -----
    Workers import the caller's main module, so a script must guard its entry with
    ``if __name__ == "__main__"``. What they print goes to stderr. They end with the caller, even
    if it is killed.
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
        self,
        function: Work[Job, Result],
        jobs: Iterable[Job],
        *,
        on_event: EventHandler | None = None,
    ) -> Generator[Outcome[Job, Result], None, None]:
        """Yield the outcome of every job; see `protocol.Executor`."""
        waiting = deque((job, 1) for job in jobs)
        start = partial(_start, bytes(ForkingPickler.dumps(function)), self.threads)
        crew: list[_Worker[Job]] = []
        try:
            environments = islice(cycle(self.environments), min(self.workers, len(waiting)))
            crew.extend(start(environment) for environment in environments)
            yield from _outcomes(crew, waiting, start, on_event or ignore_event)
            for worker in crew:
                worker.pipe.close()  # nothing is left to do
            for worker in crew:
                worker.process.join(_PATIENCE)
        finally:  # workers are asked to end first, so that they can release their locks
            for worker in crew:
                worker.process.terminate()
            for worker in crew:
                worker.process.join(_PATIENCE)
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()


def _outcomes(
    crew: list[_Worker[Job]],
    waiting: deque[tuple[Job, int]],
    start: Callable[[Mapping[str, str]], _Worker[Job]],
    on_event: EventHandler,
) -> Iterator[Outcome[Job, Any]]:
    """Keep every worker busy, and replace those that die, until nothing is left."""
    while waiting or any(worker.busy for worker in crew):
        for worker in crew:
            if waiting and not worker.busy:
                worker.job, worker.attempts = waiting.popleft()
                with suppress(ConnectionError):  # it is gone, and reading its pipe will show it
                    worker.pipe.send(worker.job)
        ready = wait([worker.pipe for worker in crew if worker.busy])
        for index in [i for i, worker in enumerate(crew) if worker.pipe in ready]:
            message = crew[index].receive()
            if isinstance(message, _Ready):
                crew[index].ready = True
                continue
            if not isinstance(message, _Done | Failed):
                on_event(message)
                continue
            job, attempts = cast("Job", crew[index].job), crew[index].attempts
            crew[index].job, crew[index].attempts = None, 0
            if isinstance(message, _Lost):
                crew[index].pipe.close()
                crew[index] = start(crew[index].environment)
            if isinstance(message, _Done):
                yield Outcome(job, message.result, None, attempts)
            elif is_final(message.error, attempts):
                yield Outcome(job, None, message.error, attempts)
            else:
                waiting.append((job, attempts + 1))
                on_event(Retried(job, message.error))


@dataclass(slots=True, eq=False)
class _Worker(Generic[Job]):
    """A process, our end of its pipe, and its current job with the number of the attempt."""

    process: SpawnProcess
    pipe: Pipe
    environment: Mapping[str, str]
    job: Job | None = None
    attempts: int = 0
    ready: bool = False

    @property
    def busy(self) -> bool:
        return self.attempts > 0

    def receive(self) -> object:
        """Return the next message of the worker, or `_Lost` if it is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(_PATIENCE)
            if not self.ready and (self.process.exitcode or 0) > 0:
                # It ended while it imported the main module, as every other one would.
                script = getattr(sys.modules["__main__"], "__file__", None) or "the main module"
                guard = 'under `if __name__ == "__main__":`'
                if self.process.exitcode == _UNGUARDED:
                    message = (
                        f"{script} starts worker processes, which import it and would start their "
                        f"own: put the call {guard}, or use one worker (workers=1)."
                    )
                    raise UnguardedScriptError(message) from None
                message = (
                    f"Worker processes cannot import {script} (exit code {self.process.exitcode}; "
                    f"their error is above): put its code {guard}, or use one worker (workers=1)."
                )
                raise InputError(message) from None
            message = (
                f"The worker process {self.process.pid} ended with exit code "
                f"{self.process.exitcode} before {self.job} was done. Did memory run out? Use "
                "fewer workers if it recurs."
            )
            return _Lost(LostWorkerError(message))


def _start(work: bytes, threads: int, environment: Mapping[str, str]) -> _Worker[Any]:
    ours, theirs = _CONTEXT.Pipe()
    arguments = (theirs, work, threads, dict(environment))
    process = _CONTEXT.Process(target=_run_worker, name=_WORKER_NAME, args=arguments, daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, environment)


def end_if_imported_by_worker() -> None:
    """End a worker process that is importing the caller's main module.

    Called by every function that starts worker processes: a script that calls one when it is
    imported would start them again in every worker.
    """
    process = multiprocessing.current_process()
    # Set by multiprocessing while it imports the main module in a new process.
    if process.name == _WORKER_NAME and getattr(process, "_inheriting", False):
        os._exit(_UNGUARDED)


# Messages of a worker in addition to events and `Failed`.


class _Lost(Failed):
    """The worker is gone."""


@dataclass(frozen=True, slots=True)
class _Done:
    """The result of a job."""

    result: Any


@dataclass(frozen=True, slots=True)
class _Ready:
    """Sent first: the worker has imported the caller's main module."""


class _CallerGone(BaseException):
    """The caller is gone; a BaseException, so that no work catches it as an error of its own."""


def _run_worker(pipe: Pipe, work: bytes, threads: int, environment: Mapping[str, str]) -> None:
    """Do the jobs that come over the pipe until it is closed; the main function of a worker.

    ``work`` is the pickled function: loading it may import numpy and torch, which read the
    environment when they are imported.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles interrupts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that locks are released
    os.dup2(2, 1)  # stdout is for the caller's data
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.update({name: str(threads) for name in _THREAD_VARIABLES} | dict(environment))
    limit: AbstractContextManager[object] = nullcontext()
    if "numpy" in sys.modules:  # loaded by the main module, before the variables were set
        from threadpoolctl import threadpool_limits

        limit = threadpool_limits(threads)

    def send(event: object) -> None:
        try:
            pipe.send(event)
        except ConnectionError:
            raise _CallerGone from None

    try:
        with limit:
            function = None
            send(_Ready())
            while True:
                pickled = pipe.recv_bytes()
                try:
                    function = function or pickle.loads(work)
                    job = pickle.loads(pickled)
                except Exception as error:  # noqa: BLE001 - it may import anything
                    send(Failed(make_picklable(error)))
                    continue
                result = attempt(function, job, send)
                if isinstance(result, Failed):
                    send(result)
                    continue
                try:
                    send(_Done(result))
                except Exception as error:  # noqa: BLE001 - a result that cannot be pickled
                    send(Failed(make_picklable(error)))
    except (_CallerGone, EOFError, ConnectionError):
        return


def _end_with_the_caller() -> None:
    """Wait for the caller's end: if it is killed, it cannot stop its workers."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os.kill(os.getpid(), signal.SIGTERM)
