"""Tables of options in which some values are lists: their axes, and the points between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from lora_analysis.errors import InputError
from lora_analysis.training.config import RunConfig
from lora_analysis.training.options import BaseOptions, DataOptions, LoopOptions

Axes = dict[str, list[Any]]

# Of these, a string in place of the table is its source.
_SOURCES = ("base", "data")
_TABLES = {"base": BaseOptions, "data": DataOptions, "loop": LoopOptions}
_PLACES = ("base.source", "data.source", "data.test")


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One choice of a value for every key; ``chosen`` are the keys that were axes, dotted."""

    values: Mapping[str, Any]
    chosen: tuple[str, ...]

    def table(self) -> dict[str, Any]:
        """Return the values as nested tables."""
        nested: dict[str, Any] = {}
        for path, value in self.values.items():
            head, _, tail = path.partition(".")
            if tail:
                nested.setdefault(head, {})[tail] = value
            else:
                nested[head] = value
        return nested

    def located(self, origin: Path) -> Point:
        """Return the point with files that lie below ``origin`` named by their whole path."""
        found = dict(self.values)
        for path in _PLACES:
            value = found.get(path)
            if isinstance(value, str) and value and (origin / value).exists():
                found[path] = str(origin / value)
        return Point(found, self.chosen)


def spelled_out(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table in which the sources that stand for a table are in one."""
    return {
        key: {"source": value} if key in _SOURCES and not isinstance(value, Mapping) else value
        for key, value in table.items()
    }


def axes_of(table: Mapping[str, Any]) -> Axes:
    """Return every key's values by its dotted name; most have one.

    Raises
    ------
    InputError
        A list is empty.
    """
    axes: Axes = {}
    for path, value in _flat(table):
        if not _is_axis(path, value):
            axes[path] = [value]
        elif value:
            axes[path] = value
        else:
            message = f"{path} is an empty list: the sweep has no run."
            raise InputError(message)
    return axes


def points(table: Mapping[str, Any], axes: Axes) -> Iterator[Point]:
    """Yield every combination of the axes' values, the last axis changing first."""
    chosen = tuple(path for path, value in _flat(table) if _is_axis(path, value))
    for values in product(*axes.values()):
        yield Point(dict(zip(axes, values, strict=True)), chosen)


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values, those of tables of options under dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping) and (key == "seed" or key in _TABLES):
            yield from ((f"{key}.{inner}", one) for inner, one in value.items())
        else:
            yield key, value


def _is_axis(path: str, value: object) -> bool:
    """Say whether a list is one of values, and not a value that is a list."""
    if not isinstance(value, list):
        return False
    return path not in _list_valued() or any(isinstance(one, list | dict) for one in value)


def _list_valued() -> set[str]:
    """Return the dotted names of the options whose value is a list or a table of patterns."""
    kinds: Sequence[tuple[str, type]] = [("", RunConfig), *_TABLES.items()]
    return {
        f"{place}.{one.name}".lstrip(".")
        for place, kind in kinds
        for one in fields(kind)
        if "tuple" in str(one.type) or "Pattern" in str(one.type)
    }
