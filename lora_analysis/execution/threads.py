"""Work spread over threads: the arithmetic runs in BLAS and LAPACK, which release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

# Of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_workers() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what comes next: a program may, a library not.

    glibc gives large blocks back at once, and fresh pages cost a walk over many small factors more
    than the arithmetic. Elsewhere it does nothing.
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

    BLAS is held to one thread meanwhile: on tall and thin matrices two threads of its own are
    slower than one, while two workers with one thread each are twice as fast.

    Parameters
    ----------
    function
        Called from several threads at once. Its first error ends the walk and is raised here.
    items
        Taken one by one: at most twice as many as there are workers are begun or done and not
        yet handed out, so that memory is bounded.
    workers
        How many threads; the CPUs of this process by default. One runs in the caller's thread.
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
