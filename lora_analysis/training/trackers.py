"""Programs that are told the metrics of a run as well; none of them can stop a training."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_analysis.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.loop import StepMetrics


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


class _RunLike:
    """wandb, or trackio, which has its functions."""

    def __init__(self, config: RunConfig, module: str, **options: Any) -> None:
        api = importlib.import_module(module)
        self.run: Any = api.init(
            project="lora-analysis", name=config.name, config=config.to_dict(), **options
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb(config: RunConfig, folder: Path) -> _Tracker:
    # Without an account named, nothing leaves the machine: `wandb sync` sends it later.
    import os

    mode = None if "WANDB_API_KEY" in os.environ else "offline"
    return _RunLike(config, "wandb", dir=str(folder), mode=mode)


def _trackio(config: RunConfig, folder: Path) -> _Tracker:  # noqa: ARG001 - it has its own place
    return _RunLike(config, "trackio")


_MAKERS: Mapping[str, tuple[str, Callable[[RunConfig, Path], _Tracker]]] = {
    "tensorboard": ("tensorboard", _Tensorboard),
    "trackio": ("trackio", _trackio),
    "wandb": ("wandb", _wandb),
}
TRACKERS = tuple(_MAKERS)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise for a tracker that does not exist or is not installed, before anything is trained.

    Raises
    ------
    InputError
        There is no such tracker.
    MissingExtraError
        Its package is not installed.
    """
    for name in names:
        if name not in _MAKERS:
            message = f"There is no tracker '{name}'. Choose from {', '.join(_MAKERS)}."
            raise InputError(message)
        package, _ = _MAKERS[name]
        if importlib.util.find_spec(package) is None:
            message = f"The tracker '{name}' is not installed. Run: pip install {package}"
            raise MissingExtraError(message)


class Trackers:
    """The trackers of one run. One that fails is noted once and told no more.

    Parameters
    ----------
    names
        From :data:`TRACKERS`.
    config, folder
        Of the run.
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
            self._try(name, partial(self._start, name, config, folder))

    def log(self, metrics: StepMetrics) -> None:
        """Tell what a step showed."""
        values = {name: v for name, v in metrics.to_dict().items() if name != "step"}
        for name, tracker in list(self.working.items()):
            self._try(name, partial(tracker.log, values, metrics.step))

    def close(self) -> None:
        """End the trackers' runs."""
        for name, tracker in list(self.working.items()):
            self._try(name, tracker.close)

    def _start(self, name: str, config: RunConfig, folder: Path) -> None:
        self.working[name] = _MAKERS[name][1](config, folder)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # trackio greets; stdout is the command's
                action()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no reason to stop
            self.working.pop(name, None)
            first = (str(error).splitlines() or [""])[0]
            self.note(
                f"The tracker {name} failed ({type(error).__name__}: {first}); it is left out."
            )
