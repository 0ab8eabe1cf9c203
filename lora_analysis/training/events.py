"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lora_analysis.training.run_folders import RunState

EventKind = Literal["skipped", "started", "note", "step", "finished"]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """What a run tells whoever watches it.

    Parameters
    ----------
    label
        Name of the run.
    kind
        ``"skipped"`` where it was finished before; else ``"started"``, then ``"note"`` for each
        sentence worth reading (rows left out), ``"step"`` after each step, then ``"finished"``.
    step, total
        Steps done, and in all. A run that goes on from a checkpoint starts at its step.
    loss
        Training loss of the step.
    test_loss, test_accuracy
        On the test split, where it was looked at after this step.
    state
        What was found in the folder: why a run was started or skipped.
    note
        The sentence of a note.
    """

    label: str
    kind: EventKind
    step: int
    total: int
    loss: float | None = None
    test_accuracy: float | None = None
    state: RunState | None = None
    test_loss: float | None = None
    lr: float | None = None
    note: str | None = None


Progress = Callable[[RunEvent], None]
