"""A run as a cell of work: what an executor sends to a worker, and what the worker does."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_analysis.errors import InUseError, named_errors
from lora_analysis.training.config import RunConfig
from lora_analysis.training.events import RunEvent
from lora_analysis.training.runs import train_run

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import Tell

# A worker that was lost on another machine holds its run's folder until its silence is noticed.
_PATIENCE = 150.0  # seconds


@dataclass(frozen=True, slots=True)
class RunCell:
    """A run on its way to a worker."""

    name: str
    config: RunConfig

    def __str__(self) -> str:
        return f"'{self.name}'"


@dataclass(frozen=True, slots=True)
class TrainCell:
    """The work of a sweep: train a run into its folder, and tell how far it is."""

    folder: Path
    device: str
    force: bool = False

    def __call__(self, cell: RunCell, tell: Tell) -> None:
        """Train a run, waiting a moment for whoever may still be in its folder."""

        def relabeled(event: RunEvent) -> None:
            tell(replace(event, label=cell.name))

        place = self.folder / cell.name
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                with named_errors(str(place)):
                    train_run(
                        cell.config,
                        place,
                        device=self.device,
                        progress=relabeled,
                        force=self.force,
                    )
            except InUseError:
                if time.monotonic() > end:
                    raise
                time.sleep(1.0)
            else:
                return
