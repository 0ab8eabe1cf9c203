"""The exit codes of every verb."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

DONE: Final = 0  # a module left out by rule is a finding, not a failure
BUG: Final = 1
USAGE: Final = 2  # click's own
REFUSED: Final = 3  # input, a missing extra, a folder in use, a full disk
PARTLY_FAILED: Final = 4  # a source failed, or a module was not read, matched or computed
CHECK_FAILED: Final = 5
INCONCLUSIVE: Final = 6
INTERRUPTED: Final = 130
# 128 + SIGPIPE: what a shell reports if a pager or `head` closed the pipe.
READER_GONE: Final = 141

_PRECEDENCE: Final = (REFUSED, CHECK_FAILED, INCONCLUSIVE, PARTLY_FAILED)


def exit_code(codes: Iterable[int]) -> int:
    """Return the code that takes precedence, `DONE` if there is none.

    Examples
    --------
    >>> exit_code([PARTLY_FAILED, CHECK_FAILED])
    5
    """
    given = set(codes)
    return next((code for code in _PRECEDENCE if code in given), DONE)
