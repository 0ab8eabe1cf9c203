"""The inside of a worker process: cells come over a pipe, events and outcomes go back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_analysis.execution.protocol import Failed, attempt, sendable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    Pipe = Connection[Any, Any]

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a cell, on its way to the executor."""

    result: Any


@dataclass(frozen=True, slots=True)
class Ready:
    """Sent first: the worker has imported the caller's main module."""


WORKER_NAME = "lora-analysis worker"
UNGUARDED = 87
"""Exit code of a worker whose main module starts workers itself."""


def end_if_imported_by_worker() -> None:
    """End a worker process that is importing the caller's main module, and nothing else.

    To be called by what starts worker processes: a script that does so when it is imported would
    start them again in every worker.
    """
    process = multiprocessing.current_process()
    # Set by multiprocessing while it imports the main module in a new process.
    if process.name == WORKER_NAME and getattr(process, "_inheriting", False):
        os._exit(UNGUARDED)


class _CallerGone(BaseException):
    """Nobody is left to tell; no work may take it for an error of its own."""


def run_worker(pipe: Pipe, work: bytes, threads: int, environment: Mapping[str, str]) -> None:
    """Do what comes over the pipe until it is closed; the main function of a worker process.

    ``work`` is the pickled function: reading it may import numpy and torch, which look at the
    environment when they are loaded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that locks are given up
    os.dup2(2, 1)  # stdout is for the caller's data
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.update({name: str(threads) for name in _THREAD_VARIABLES} | dict(environment))
    try:
        with _limited(threads):
            _serve(pipe, work)
    except (_CallerGone, EOFError, ConnectionError):
        return


def _serve(pipe: Pipe, work: bytes) -> None:
    def tell(event: object) -> None:
        try:
            pipe.send(event)
        except ConnectionError:
            raise _CallerGone from None

    function = None
    tell(Ready())
    while True:
        sent = pipe.recv_bytes()
        try:
            function = function or pickle.loads(work)
            cell = pickle.loads(sent)
        except Exception as error:  # noqa: BLE001 - it may import anything
            tell(Failed(sendable(error)))
            continue
        result = attempt(function, cell, tell)
        if isinstance(result, Failed):
            tell(result)
            continue
        try:
            tell(Done(result))
        except Exception as error:  # noqa: BLE001 - a result that does not pickle
            tell(Failed(sendable(error)))


def _limited(threads: int) -> AbstractContextManager[object]:
    """Limit what the main module has loaded already; the rest reads the environment."""
    if "numpy" not in sys.modules:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(threads)
    return limits


def _end_with_the_caller() -> None:
    """Wait for the caller's end; one that was killed could stop nobody."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os.kill(os.getpid(), signal.SIGTERM)
