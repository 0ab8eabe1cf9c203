"""Pieces of work for the tests of executors: other processes import them from here."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from lora_analysis.errors import InputError


def square(cell, tell):
    tell(("at", cell))
    return cell * cell


def refuse_three(cell, tell):
    if cell == 3:
        message = "three is refused"
        raise InputError(message)
    return cell


class Tally:
    """Fail at one cell as often as asked, counting the attempts in files of a folder."""

    def __init__(self, folder: Path, *, failures: int, how: str) -> None:
        self.folder, self.failures, self.how = folder, failures, how

    def attempts(self, cell) -> int:
        return len(list(self.folder.glob(f"{cell}-*")))

    def __call__(self, cell, tell):  # noqa: ARG002
        number = self.attempts(cell) + 1
        (self.folder / f"{cell}-{number}").touch()
        if cell == 2 and number <= self.failures:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            message = f"attempt {number}"
            raise RuntimeError(message)
        return cell


class ForeignError(Exception):
    """Pickles to something that cannot be read again."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def raise_foreign(cell, tell):
    raise ForeignError(cell, "more")


def return_function(cell, tell):
    return lambda: cell


def setting(cell, tell):
    import numpy as np
    from threadpoolctl import threadpool_info

    np.ones((2, 2)) @ np.ones((2, 2))
    threads = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), threads


def print_something(cell, tell):
    print("from the work")  # noqa: T201
    sys.stdout.flush()


def here(cell, tell):
    return str(Path.cwd())


class UntilStopped:
    """Work for ever, and say in a file when it is stopped in an orderly way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, cell, tell):
        (self.folder / f"started-{cell}").write_text(str(os.getpid()))
        try:
            while True:
                tell(cell)
                time.sleep(0.02)
        finally:
            (self.folder / f"stopped-{cell}").touch()


class Meeting:
    """End when as many cells as asked have begun; return the process."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __call__(self, cell, tell):  # noqa: ARG002
        (self.folder / str(cell)).touch()
        for _ in range(3000):
            if len(list(self.folder.iterdir())) == self.count:
                return os.getpid()
            time.sleep(0.02)
        message = "the others did not come"
        raise InputError(message)


def address(cell, tell):
    """Return the address of the machine, when another cell has begun as well."""
    import ray

    Meeting(Path(os.environ["MEETING"]), 2)(cell, tell)
    return ray.util.get_node_ip_address()
