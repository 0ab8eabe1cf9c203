"""Names of a sweep's runs: folders that say what is in them, and that no two runs share."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from lora_analysis.training.axes import Point
from lora_analysis.training.config import RunConfig

# What RunConfig.name says already.
_SAID = {
    *("task", "rank", "method", "seed", "seed.init", "seed.data", "seed.dropout"),
    *("data_seed", "dropout_seed"),
}
_LONGEST = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


def named_runs(points: Sequence[Point]) -> dict[str, RunConfig]:
    """Return the runs of a sweep by name, each once, in the order of the points.

    A name is the run's own (``rotate-r8-s0``) with the value of every other axis
    (``-lr0.003``), and of every key in which grids differ. Where two runs would still share one,
    both carry a hash of their configuration.
    """
    told = _told(points)
    found: dict[RunConfig, str] = {}
    for point in points:
        config = RunConfig.from_dict(point.table())
        found.setdefault(config, _name(config, point, told))
    # Some file systems do not tell large letters from small ones.
    shared = Counter(name.casefold() for name in found.values())
    return {
        name if shared[name.casefold()] == 1 else f"{name}-{_digest(config)}": config
        for config, name in found.items()
    }


def _told(points: Sequence[Point]) -> list[str]:
    """Return the keys whose values belong into names."""
    paths = list(dict.fromkeys(path for point in points for path in point.values))
    told = []
    for path in paths:
        values = [point.values.get(path) for point in points]
        is_axis = any(path in point.chosen for point in points)
        if path not in _SAID and (is_axis or any(value != values[0] for value in values)):
            told.append(path)
    return told


def _name(config: RunConfig, point: Point, told: Sequence[str]) -> str:
    # The task is named after the data where it has no name of its own.
    said = set() if "task" in point.values else {"data.source"}
    own = [path for path in told if path in point.values and path not in said]
    parts = [config.name, *(_part(path, point.values[path]) for path in own)]
    name = _UNSAFE.sub("-", "-".join(parts)).strip(".-")
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}-{_digest(config)}"


def _part(path: str, value: Any) -> str:
    """Return ``lr0.003`` for a number, ``schedule-linear`` for a word."""
    key = path.removesuffix(".source").rpartition(".")[2]
    if isinstance(value, bool):
        return f"{key}-{str(value).lower()}"
    if isinstance(value, int | float):
        return f"{key}{value}"
    if isinstance(value, list):
        return f"{key}-{'+'.join(map(str, value))}"
    if isinstance(value, dict):
        return f"{key}-{'+'.join(f'{name}={one}' for name, one in value.items())}"
    return f"{key}-{PurePath(value).stem if path.endswith('.source') else value}"


def _digest(config: RunConfig) -> str:
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
