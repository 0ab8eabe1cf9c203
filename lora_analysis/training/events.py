"""Whom a run reports to: its caller, by events, and experiment trackers, which cannot stop it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lora_analysis.errors import InputError, require_package

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.loop import StepMetrics
    from lora_analysis.training.run_folders import RunState

EventKind = Literal["skipped", "started", "note", "step", "finished", "retried", "failed"]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Event of a run, for its caller.

    Parameters
    ----------
    label
        Name of the run.
    kind
        ``"skipped"`` if the run was finished before; otherwise ``"started"``, ``"note"`` for each
        sentence worth reading (rows left out), ``"step"`` after each step, then ``"finished"``.
        In a sweep also ``"retried"`` after an error, and ``"failed"`` after the last one.
    step, total
        Steps done, and in total. A run that continues from a checkpoint starts at its step.
    loss
        Training loss of the step.
    test_loss, test_accuracy
        Loss and accuracy on the test split, if it was evaluated after this step.
    state
        State of the folder before the run: why it was started or skipped.
    note
        Sentence of a note, or the error of a run that failed.
    """

    label: str
    kind: EventKind
    step: int = 0
    total: int = 0
    loss: float | None = None
    test_accuracy: float | None = None
    state: RunState | None = None
    test_loss: float | None = None
    lr: float | None = None
    note: str | None = None


class _Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _Tensorboard:
    def __init__(self, config: RunConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard" / config.name))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """wandb, or trackio, which has the same functions."""

    def __init__(self, config: RunConfig, folder: Path, *, module: str) -> None:
        options: dict[str, Any] = {}
        if module == "wandb":
            # Without an account, nothing leaves the machine: `wandb sync` sends it later.
            mode = None if "WANDB_API_KEY" in os.environ else "offline"
            options = {"dir": str(folder), "mode": mode}
        # In a sweep, the folder's name has the options in which runs of one name differ.
        name = folder.name if folder.name.startswith(config.name) else config.name
        api = importlib.import_module(module)
        self.run: Any = api.init(
            project="lora-analysis", name=name, config=config.to_dict(), **options
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: Mapping[str, Callable[[RunConfig, Path], _Tracker]] = {
    "tensorboard": _Tensorboard,
    "trackio": partial(_Wandb, module="trackio"),
    "wandb": partial(_Wandb, module="wandb"),
}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise for a tracker that does not exist or is not installed.

    Raises
    ------
    InputError
        There is no such tracker.
    MissingExtraError
        Its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            message = f"There is no tracker '{name}'. Choose from {', '.join(TRACKERS)}."
            raise InputError(message)
        require_package(name, "trackers", f"The tracker '{name}'")


class Trackers:
    """The trackers of one run. One that fails is reported once and then left out.

    Parameters
    ----------
    names
        Keys of :data:`TRACKERS`.
    config, folder
        Configuration and folder of the run.
    note
        Called with a sentence about a tracker that failed.
    """

    def __init__(
        self, names: tuple[str, ...], config: RunConfig, folder: Path, note: Callable[[str], None]
    ) -> None:
        self.note = note
        self.working: dict[str, _Tracker] = {}
        check_trackers(names)
        for name in names:
            self._call_tracker(name, partial(self._start, name, config, folder))

    def log(self, metrics: StepMetrics) -> None:
        """Send the metrics of a step."""
        values = {name: v for name, v in metrics.to_dict().items() if name != "step"}
        for name, tracker in list(self.working.items()):
            self._call_tracker(name, partial(tracker.log, values, metrics.step))

    def close(self) -> None:
        """Finish the run in every tracker."""
        for name, tracker in list(self.working.items()):
            self._call_tracker(name, tracker.close)

    def _start(self, name: str, config: RunConfig, folder: Path) -> None:
        self.working[name] = TRACKERS[name](config, folder)

    def _call_tracker(self, name: str, action: Callable[[], None]) -> None:
        """Call a function of a tracker; if it fails, note why and leave the tracker out."""
        try:
            with redirect_stdout(sys.stderr):  # trackio prints a greeting; stdout is for data
                action()
        except Exception as error:  # noqa: BLE001 - no error of a tracker stops a run
            self.working.pop(name, None)
            first_line = (str(error).splitlines() or [""])[0]
            self.note(
                f"The tracker {name} failed ({type(error).__name__}: {first_line}); it is left out."
            )
