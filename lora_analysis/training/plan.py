"""A sweep from a TOML file: every combination of the listed values is a run with a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_toml
from lora_analysis.training.axes import Point, axes_of, points, spelled_out
from lora_analysis.training.config import RunConfig
from lora_analysis.training.naming import named_runs
from lora_analysis.training.options import check, check_choice, from_table, refuse_unknown
from lora_analysis.training.presets import merged, preset

ExecutorName = Literal["auto", "serial", "process", "ray"]

# More is a slip of the keyboard: at a second each they would take a day.
MAX_RUNS = 100_000

_OWN_KEYS = ("grid", "execution", "output", "preset")


@dataclass(frozen=True, slots=True)
class ExecutionOptions:
    """Where a sweep's runs are trained; nothing of it shapes their results.

    Parameters
    ----------
    executor
        ``"serial"``, ``"process"``, ``"ray"``; ``"auto"`` takes processes where there is more
        than one worker and run.
    workers
        Runs side by side. None: one per GPU, or on a CPU one per core, at most 4; with Ray as
        many as the cluster has room for.
    device
        ``"auto"``, or a device as torch names it.
    address
        Of the Ray cluster; None starts one on this machine, or takes ``$RAY_ADDRESS``.
    cpus, gpus
        What Ray reserves for a run; ``gpus`` None takes one where the cluster has any.

    Raises
    ------
    InputError
        A value is out of its range.
    """

    executor: ExecutorName = "auto"
    workers: int | None = None
    device: str = "auto"
    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        check_choice("executor", self.executor, ExecutorName)
        check("workers", self.workers, self.workers is None or self.workers >= 1, "at least 1")
        check("cpus", self.cpus, self.cpus > 0, "positive")
        check("gpus", self.gpus, self.gpus is None or self.gpus >= 0, "at least 0")


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep trains: runs by name, where their folders go, and how it is done.

    Attributes
    ----------
    source
        The file that was read.
    runs
        Every run by the name of its folder, in the order of the file.
    output
        The folder that the file names, from the file's own; None where it names none.
    execution
        What the file says about where to train.
    """

    source: Path
    runs: Mapping[str, RunConfig]
    output: Path | None = None
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)


def read_plan(path: Path) -> SweepPlan:
    """Return the sweep that a TOML file describes.

    Keys are those of `RunConfig.from_dict`. A key that is given a list of values is an axis, and
    every combination is a run; for a key whose value is a list itself (``targets``), that is a
    list of lists. ``base = "folder"`` and ``data = "file"`` stand for their ``source``, ``preset``
    for the options of that name (`training.presets`), over which all others go. Each table
    ``[[grid]]`` is a sweep of its own over what stands at the top, and may overrule it.
    ``[execution]`` says where to train (`ExecutionOptions`), ``output`` into which folder. Files
    that lie beside the TOML file may be named from there.

    Raises
    ------
    SourceError
        Nothing lies at the path.
    MalformedFileError
        The file is not TOML.
    InputError
        A key is unknown (near names are given), a value wrong, or an axis empty.
    """
    document = read_toml(path)
    try:
        return _plan(document, path)
    except InputError as error:
        message = f"{path}: {error}"
        raise type(error)(message) from error


def _plan(document: Mapping[str, Any], path: Path) -> SweepPlan:
    known = dict.fromkeys([one.name for one in fields(RunConfig)] + list(_OWN_KEYS))
    common = dict(document)
    grids = common.pop("grid", [{}])
    execution = from_table(ExecutionOptions, common.pop("execution", {}), "execution")
    output = common.pop("output", None)
    if not (isinstance(grids, list) and grids and all(isinstance(one, dict) for one in grids)):
        message = f"grid must be one or more tables, each under [[grid]]; found {grids!r}."
        raise InputError(message)
    if not isinstance(output, str | None):
        message = f"output must be a folder's name, found {output!r}."
        raise InputError(message)
    for table in (common, *grids):
        for key in table:
            refuse_unknown(key, known, "")
    tables = [_laid_over(common, grid) for grid in grids]
    runs = named_runs(_points(tables, path.absolute().parent))
    folder = None if output is None else path.parent / output
    return SweepPlan(path, runs, folder, execution)


def _laid_over(common: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
    """Return a grid's options over those at the top, and both over the preset they name."""
    own = merged(spelled_out(common), spelled_out(grid))
    name = own.pop("preset", None)
    if name is None:
        return own
    if not isinstance(name, str):
        message = f"preset must be one name, found {name!r}. Use a [[grid]] for each of several."
        raise InputError(message)
    return merged(preset(name), own)


def _points(tables: list[dict[str, Any]], origin: Path) -> list[Point]:
    found: list[Point] = []
    for table in tables:
        for point in points(table, axes_of(table)):
            if len(found) == MAX_RUNS:
                message = f"The axes make more than {MAX_RUNS:,} runs. Drop an axis, or values."
                raise InputError(message)
            found.append(point.located(origin))
    return found
