"""Parallel work in threads, in processes, or on several machines; independent of what the work is.

`in_threads` is for arithmetic within one process: BLAS and LAPACK, where it runs, release the GIL.
Executors take jobs of minutes or hours and retry those whose worker died: `protocol` (the
interface, and a serial one), `processes`, and `cluster` (Ray). A job writes its results to disk
itself, whole or not at all: nothing here stores results.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

__all__ = ["available_workers", "in_threads", "keep_freed_memory"]

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_workers() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for later: for programs, not for libraries to call.

    glibc returns large blocks to the system at once, and in a walk over many small factors fresh
    pages cost more than the arithmetic. Has no effect with other C libraries.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(option, 1 << 30)


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in the order of the items.

    BLAS is limited to one thread meanwhile: on tall and thin matrices two threads of its own are
    slower than one, while two workers with one thread each are twice as fast.

    Parameters
    ----------
    function
        Called from several threads at once. Its first error ends the iteration and is raised.
    items
        Taken one by one: at most two per worker are started or finished but not yet yielded, so
        that memory is bounded.
    workers
        Number of threads; by default the CPUs of this process. One runs in the caller's thread.
    """
    count = workers or available_workers()
    with threadpool_limits(1, user_api="blas"):
        if count == 1:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(count) as pool:
            try:
                for item in items:
                    pending.append(pool.submit(function, item))
                    if len(pending) >= 2 * count:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
