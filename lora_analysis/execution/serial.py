"""One cell after the other, in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from lora_analysis.execution.protocol import (
    Cell,
    Outcome,
    Result,
    Retried,
    Tell,
    Work,
    is_final,
)


class SerialExecutor:
    """Work in the caller's own process and thread, cells in their order; nothing is pickled."""

    def map(
        self, function: Work[Cell, Result], cells: Iterable[Cell], *, tell: Tell | None = None
    ) -> Generator[Outcome[Cell, Result], None, None]:
        """Yield the outcome of every cell; see `protocol.Executor`."""
        for cell in cells:
            yield _outcome(function, cell, tell or _ignore)


def _outcome(function: Work[Cell, Result], cell: Cell, tell: Tell) -> Outcome[Cell, Result]:
    watchers: list[Exception] = []  # errors of whoever watches are not the cell's

    def telling(event: object) -> None:
        try:
            tell(event)
        except Exception as error:
            watchers.append(error)
            raise

    attempts = 0
    while True:
        attempts += 1
        try:
            return Outcome(cell, function(cell, telling), None, attempts)
        except Exception as error:
            if error in watchers:
                raise
            if is_final(error, attempts):
                return Outcome(cell, None, error, attempts)
            tell(Retried(cell, error))


def _ignore(_event: object) -> None:
    """Watch nothing."""
