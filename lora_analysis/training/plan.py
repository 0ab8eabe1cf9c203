"""Sweeps from TOML files: every combination of the listed values is a run with a name.

A table of options becomes axes (a list of values per key), the axes become points (one value per
key), and every point a `RunConfig` under a name that no other run has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice, product
from pathlib import Path, PurePath
from typing import Any, Literal

from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_toml
from lora_analysis.training.config import RunConfig, get_preset, merge_tables
from lora_analysis.training.options import (
    BaseOptions,
    DataOptions,
    LoopOptions,
    check,
    check_choice,
    check_key,
    parse_options,
)

ExecutorName = Literal["auto", "serial", "process", "ray"]

# More are a typing error: at a second each they would take a day.
MAX_RUNS = 100_000

_PLAN_KEYS = ("grid", "execution", "output", "preset")
_TABLES = {"base": BaseOptions, "data": DataOptions, "loop": LoopOptions}
# Tables for which a string stands for their source.
_SOURCES = ("base", "data")
_PATHS = ("base.source", "data.source", "data.test")
# Keys that are already in RunConfig.name.
_NAMED_KEYS = {
    *("task", "rank", "method", "seed", "seed.init", "seed.data", "seed.dropout"),
    *("data_seed", "dropout_seed"),
}
_MAX_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass(frozen=True, slots=True)
class ExecutionOptions:
    """How and where to train the runs of a sweep; has no effect on their results.

    Parameters
    ----------
    executor
        ``"serial"``, ``"process"`` or ``"ray"``; ``"auto"`` uses processes for more than one
        worker and run.
    workers
        Number of runs in parallel. None: one per GPU, or on a CPU one per core, at most 4; with
        Ray as many as fit into the cluster.
    device
        ``"auto"``, or a torch device name.
    address
        Address of the Ray cluster; None takes ``$RAY_ADDRESS`` or starts one on this machine.
    trackers
        Experiment trackers of every run: ``"tensorboard"``, ``"trackio"``, ``"wandb"``.
    cpus, gpus
        CPUs and GPUs that Ray reserves per run; ``gpus`` None takes one if the cluster has any.

    Raises
    ------
    InputError
        A value is out of range.
    """

    executor: ExecutorName = "auto"
    workers: int | None = None
    device: str = "auto"
    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("executor", self.executor, ExecutorName)
        check("workers", self.workers, self.workers is None or self.workers >= 1, "at least 1")
        check("cpus", self.cpus, self.cpus > 0, "positive")
        check("gpus", self.gpus, self.gpus is None or self.gpus >= 0, "at least 0")


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Runs of a sweep by name, their output folder, and how to train them.

    Attributes
    ----------
    source
        TOML file of the plan.
    runs
        Configurations by the names of their folders, in the order of the file.
    output
        Folder in the file, relative to the file's own folder; None if it has none.
    execution
        Options in the file on how and where to train.
    """

    source: Path
    runs: Mapping[str, RunConfig]
    output: Path | None = None
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)


def read_plan(path: Path) -> SweepPlan:
    """Read the plan of a sweep from a TOML file.

    Keys are those of `RunConfig.from_dict`. A key with a list of values is an axis, and every
    combination is a run; for a key whose value itself is a list (``targets``), an axis is a list
    of lists. ``base = "folder"`` and ``data = "file"`` stand for their ``source``, ``preset`` for
    the options with that name (`training.config`), which all others override. Each table
    ``[[grid]]`` is a sweep of its own and overrides the options at the top. ``[execution]`` has
    the fields of `ExecutionOptions`, ``output`` is the folder for the runs. Paths may be relative
    to the TOML file.

    Raises
    ------
    SourceError
        The file does not exist.
    MalformedFileError
        The file is not TOML.
    InputError
        A key is unknown (the message has near names), a value is wrong, or an axis is empty.
    """
    document = read_toml(path)
    try:
        return _parse_plan(document, path)
    except InputError as error:
        message = f"{path}: {error}"
        raise type(error)(message) from error


def _parse_plan(document: dict[str, Any], path: Path) -> SweepPlan:
    grids = document.pop("grid", [{}])
    execution = parse_options(ExecutionOptions, document.pop("execution", {}), "execution")
    output = document.pop("output", None)
    if not (isinstance(grids, list) and grids and all(isinstance(grid, dict) for grid in grids)):
        message = f"grid must be one or more tables, each under [[grid]]; found {grids!r}."
        raise InputError(message)
    if not isinstance(output, str | None):
        message = f"output must be a folder's name, found {output!r}."
        raise InputError(message)
    keys = [*(field.name for field in fields(RunConfig)), *_PLAN_KEYS]
    for table in (document, *grids):
        for key in table:
            check_key(key, keys)
    points: list[_Point] = []
    for grid in grids:
        combinations = _iterate_points(_combine(document, grid), path.absolute().parent)
        points += islice(combinations, MAX_RUNS + 1 - len(points))
    if len(points) > MAX_RUNS:
        message = f"The axes make more than {MAX_RUNS:,} runs. Drop an axis, or values."
        raise InputError(message)
    folder = None if output is None else path.parent / output
    return SweepPlan(path, _name_runs(points), folder, execution)


def _combine(common: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a grid over those at the top, and both over their preset."""
    tables = [
        {
            key: {"source": value} if key in _SOURCES and not isinstance(value, Mapping) else value
            for key, value in table.items()
        }
        for table in (common, grid)
    ]
    options = merge_tables(*tables)
    name = options.pop("preset", None)
    if name is None:
        return options
    if not isinstance(name, str):
        message = f"preset must be one name, found {name!r}. Use a [[grid]] for each of several."
        raise InputError(message)
    return merge_tables(get_preset(name), options)


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """One value for every (dotted) key; ``axes`` are the keys that have several in the file."""

    values: Mapping[str, Any]
    axes: tuple[str, ...]


def _iterate_points(table: Mapping[str, Any], origin: Path) -> Iterator[_Point]:
    """Yield every combination of the axes' values, the last axis changing first.

    Paths that exist relative to ``origin`` become absolute.
    """
    flat: dict[str, Any] = {}  # with dotted keys for tables of options
    for key, value in table.items():
        if isinstance(value, Mapping) and (key == "seed" or key in _TABLES):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    axes: list[str] = []
    choices: dict[str, list[Any]] = {}
    for key, value in flat.items():
        table_name, _, name = key.rpartition(".")
        kind = _TABLES.get(table_name, RunConfig)
        annotation = next((str(field.type) for field in fields(kind) if field.name == name), "")
        is_axis = isinstance(value, list)
        if is_axis and ("tuple" in annotation or "Pattern" in annotation):
            # A value of this field is itself a list, so its axis is a list of lists.
            is_axis = any(isinstance(item, list | dict) for item in value)
        choices[key] = value if is_axis else [value]
        if is_axis:
            axes.append(key)
        if not choices[key]:
            message = f"{key} is an empty list: the sweep has no run."
            raise InputError(message)
    for combination in product(*choices.values()):
        values = dict(zip(choices, combination, strict=True))
        for key in _PATHS:
            value = values.get(key)
            if isinstance(value, str) and value and (origin / value).exists():
                values[key] = str(origin / value)
        yield _Point(values, tuple(axes))


def _name_runs(points: Sequence[_Point]) -> dict[str, RunConfig]:
    """Return the distinct runs of a sweep by name, in the order of the points.

    A name is that of the configuration (``rotate-r8-s0``) with the value of every other axis
    (``-lr0.003``) and of every key in which grids differ. If two runs would still have the same
    name, a hash of the configuration is added to both.
    """
    suffix_keys = []
    for key in dict.fromkeys(key for point in points for key in point.values):
        values = [point.values.get(key) for point in points]
        is_axis = any(key in point.axes for point in points)
        if key not in _NAMED_KEYS and (is_axis or any(value != values[0] for value in values)):
            suffix_keys.append(key)
    names: dict[RunConfig, str] = {}
    for point in points:
        nested: dict[str, Any] = {}
        for key, value in point.values.items():
            head, _, tail = key.partition(".")
            if tail:
                nested.setdefault(head, {})[tail] = value
            else:
                nested[head] = value
        config = RunConfig.from_dict(nested)
        parts = [config.name]
        for key in suffix_keys:
            # A task without a name is named after its data.
            is_named = key == "data.source" and "task" not in point.values
            if key in point.values and not is_named:
                parts.append(_format_value(key, point.values[key]))
        name = _UNSAFE.sub("-", "-".join(parts)).strip(".-")
        if len(name) > _MAX_NAME:
            name = f"{name[:_MAX_NAME]}-{_digest(config)}"
        names.setdefault(config, name)
    # Some file systems do not distinguish upper and lower case.
    counts = Counter(name.casefold() for name in names.values())
    return {
        name if counts[name.casefold()] == 1 else f"{name}-{_digest(config)}": config
        for config, name in names.items()
    }


def _format_value(path: str, value: Any) -> str:
    """Return ``lr0.003`` for a number, ``schedule-linear`` for a word."""
    key = path.removesuffix(".source").rpartition(".")[2]
    if isinstance(value, bool):
        return f"{key}-{str(value).lower()}"
    if isinstance(value, int | float):
        return f"{key}{value}"
    if isinstance(value, list):
        return f"{key}-{'+'.join(map(str, value))}"
    if isinstance(value, dict):
        return f"{key}-{'+'.join(f'{name}={inner}' for name, inner in value.items())}"
    return f"{key}-{PurePath(value).stem if path.endswith('.source') else value}"


def _digest(config: RunConfig) -> str:
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
