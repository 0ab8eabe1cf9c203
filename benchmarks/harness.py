"""Sides timed in turn, and the table they make."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio, the target it is held against, and an accuracy."""

    what: str
    against: str
    ratio: float
    target: str
    accuracy: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        sign, _, bound = self.target.partition(" ")
        if not bound:
            return None
        value = float(bound.replace(",", ""))
        return self.ratio >= value if sign == "≥" else self.ratio <= value

    def cells(self) -> list[str]:
        """Return the row's text, column by column."""
        ratio = self.ratio
        shown = f"{ratio:,.0f} ×" if ratio >= 100 else f"{ratio:.{2 if ratio >= 0.1 else 4}f} ×"
        verdict = {None: "", True: "yes", False: "no"}[self.met]
        return [self.what, self.against, shown, self.target, verdict, self.accuracy, self.note]


HEADINGS = ["what", "against", "ratio", "target", "met", "accuracy", "note"]


def seconds(call: Call, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one call, with the garbage collector out of the way."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        call()
        return clock() - start
    finally:
        gc.enable()


def in_turn(
    sides: Mapping[str, Call],
    rounds: int,
    *,
    warm: bool = True,
    before: Call = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of every side; each round runs all of them once, in turn.

    A machine that slows down for a while then slows all sides alike, and ratios hold. ``before``
    is called before each, and not timed.
    """
    if warm:
        for call in sides.values():
            call()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            before()
            found[name].append(seconds(call, clock))
    return {name: statistics.median(times) for name, times in found.items()}


def repeated(call: Call, times: int) -> Call:
    """Return a call that runs ``times`` over, for what is too short to be timed once."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def process(code: str, *arguments: str) -> Call:
    """Return a call that runs a line of code in a fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# A small process of its own starts the command: the peak of a process begins at its parent's size.
_LAUNCHER = """
import os, subprocess, sys
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], **quiet).pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
"""


def process_usage(*arguments: str) -> tuple[float, float]:
    """Run the command line in a fresh interpreter; return its CPU-seconds and its peak in MB.

    CPU time, since what other programs do on the machine lengthens the wait.
    """
    command = [sys.executable, "-m", "lora_analysis", *arguments]
    launched = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *command], check=True, capture_output=True, text=True
    )
    code, seconds, peak = map(float, launched.stdout.split())
    if code:
        raise subprocess.CalledProcessError(int(code), command)
    return seconds, peak


def markdown(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
