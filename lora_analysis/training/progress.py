"""The events of many runs as two counts: adapters done, and steps done in all."""

from __future__ import annotations

from collections.abc import Callable

from lora_analysis.training.events import RunEvent

Counts = Callable[[str, int, int], None]


class SweepProgress:
    """Take events of runs, and tell what is done of what, for a progress bar.

    Parameters
    ----------
    counts
        Called with (what, done, total).
    runs
        How many there are.
    """

    def __init__(self, counts: Counts, runs: int) -> None:
        self.counts = counts
        self.runs = runs
        self.steps: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.done: set[str] = set()

    def __call__(self, event: RunEvent) -> None:
        """Take one event."""
        self.steps[event.label] = event.step
        self.totals[event.label] = event.total
        if event.kind in ("finished", "skipped"):
            self.done.add(event.label)
        # Runs that have not begun are taken to be as long as this one.
        expected = sum(self.totals.values()) + (self.runs - len(self.totals)) * event.total
        self.counts("training steps", sum(self.steps.values()), expected)
        self.counts("adapters", len(self.done), self.runs)
