"""Runs in processes of their own, each fed over a pipe, one run after the other."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_analysis.errors import LoraAnalysisError
from lora_analysis.training.config import RunConfig
from lora_analysis.training.runs import Progress, train_run

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    Pipe = Connection[Any, Any]

Job = tuple[RunConfig, Path]

_PATIENCE = 5.0  # seconds a worker is given to end when it is asked to


def train_in_processes(
    jobs: Sequence[Job],
    count: int,
    *,
    device: str,
    progress: Progress | None,
) -> None:
    """Train every job in one of ``count`` worker processes.

    Raises
    ------
    LoraAnalysisError
        A worker ended before its run was done; any error of a run itself is raised as it is, with
        the worker's traceback as a note. In either case the other workers are stopped.
    """
    waiting = iter(jobs)
    with _started(count, device) as workers:
        at_work: dict[Pipe, Job] = {}
        for pipe in workers:
            _give_next(pipe, waiting, at_work, workers[pipe])
        while at_work:
            ready = wait(list(at_work))
            for pipe in [pipe for pipe in at_work if pipe in ready]:
                message = _receive(pipe, at_work[pipe][0], workers[pipe])
                if message is None:
                    del at_work[pipe]
                    _give_next(pipe, waiting, at_work, workers[pipe])
                elif progress is not None:
                    progress(message)


def _give_next(
    pipe: Pipe, waiting: Iterator[Job], at_work: dict[Pipe, Job], worker: SpawnProcess
) -> None:
    """Send a worker its next job, where there is one left."""
    job = next(waiting, None)
    if job is not None:
        try:
            pipe.send(job)
        except ConnectionError:
            _report_death(job[0], worker)
        at_work[pipe] = job


def _receive(pipe: Pipe, config: RunConfig, worker: SpawnProcess) -> Any:
    """Return an event, or None when the run is done; raise what the worker met."""
    try:
        message = pipe.recv()
    except (EOFError, ConnectionError):
        _report_death(config, worker)
    if isinstance(message, BaseException):
        raise message
    return message


def _report_death(config: RunConfig, worker: SpawnProcess) -> NoReturn:
    worker.join(_PATIENCE)
    message = (
        f"The worker process that trained '{config.name}' ended with exit code {worker.exitcode} "
        "before it was done; was it killed for want of memory? Finished runs are kept: "
        "run again to go on, with fewer workers if it recurs."
    )
    raise LoraAnalysisError(message)


@contextmanager
def _started(count: int, device: str) -> Iterator[dict[Pipe, SpawnProcess]]:
    """Start workers by their pipes, and end them whatever happens inside the block."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    workers: dict[Pipe, SpawnProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, device), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
        yield workers
        for pipe in workers:
            with suppress(ConnectionError):  # nothing was left to do for one that is gone
                pipe.send(None)
        for worker in workers.values():
            worker.join(_PATIENCE)
    finally:
        for worker in workers.values():
            worker.terminate()
        for pipe, worker in workers.items():
            worker.join(_PATIENCE)
            worker.kill()
            worker.join()
            pipe.close()


def _work(pipe: Pipe, device: str) -> None:
    """Train what comes over the pipe until None comes, telling every event; the worker's main."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a run gives up its folder
    while (job := pipe.recv()) is not None:
        config, folder = job
        try:
            train_run(config, folder, device=device, progress=pipe.send)
        except BrokenPipeError:
            return  # the caller is gone
        except Exception as error:  # noqa: BLE001 - raised again in the caller
            error.add_note(f"In the worker process that trained '{config.name}':")
            error.add_note(traceback.format_exc())
            pipe.send(error)
        else:
            pipe.send(None)
