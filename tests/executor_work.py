"""Pieces of work for the tests of executors: other processes import them from here."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from lora_analysis.errors import InputError


def square(job, send_event):
    send_event(("at", job))
    return job * job


def refuse_three(job, send_event):
    if job == 3:
        message = "three is refused"
        raise InputError(message)
    return job


class Tally:
    """Fail at one job as often as asked, counting the attempts in files of a folder."""

    def __init__(self, folder: Path, *, failures: int, how: str) -> None:
        self.folder, self.failures, self.how = folder, failures, how

    def attempts(self, job) -> int:
        return len(list(self.folder.glob(f"{job}-*")))

    def __call__(self, job, send_event):  # noqa: ARG002
        number = self.attempts(job) + 1
        (self.folder / f"{job}-{number}").touch()
        if job == 2 and number <= self.failures:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            message = f"attempt {number}"
            raise RuntimeError(message)
        return job


class ForeignError(Exception):
    """Pickles to something that cannot be read again."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def raise_foreign(job, send_event):
    raise ForeignError(job, "more")


def return_function(job, send_event):
    return lambda: job


def setting(job, send_event):
    import numpy as np
    from threadpoolctl import threadpool_info

    np.ones((2, 2)) @ np.ones((2, 2))
    threads = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), threads


def print_something(job, send_event):
    print("from the work")  # noqa: T201
    sys.stdout.flush()


def here(job, send_event):
    return str(Path.cwd())


class UntilStopped:
    """Work for ever, and say in a file when it is stopped in an orderly way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, job, send_event):
        (self.folder / f"started-{job}").write_text(str(os.getpid()))
        try:
            while True:
                send_event(job)
                time.sleep(0.02)
        finally:
            (self.folder / f"stopped-{job}").touch()


class Meeting:
    """End when as many jobs as asked have begun; return the process."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __call__(self, job, send_event):  # noqa: ARG002
        (self.folder / str(job)).touch()
        for _ in range(3000):
            if len(list(self.folder.iterdir())) == self.count:
                return os.getpid()
            time.sleep(0.02)
        message = "the others did not come"
        raise InputError(message)


def address(job, send_event):
    """Return the address of the machine, when another job has begun as well."""
    import ray

    Meeting(Path(os.environ["MEETING"]), 2)(job, send_event)
    return ray.util.get_node_ip_address()
