"""Printing: rich tables for people, one strict JSON document for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

SCHEMA_VERSION = 1

_BARS = "▁▂▃▄▅▆▇█"


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document; what is not a finite number becomes null, listed with its path."""
    undefined: list[str] = []
    clean = _clean(dict(document), "$", undefined)
    clean = {"schema_version": SCHEMA_VERSION, **clean}
    if undefined:
        clean["undefined"] = dict.fromkeys(undefined, "not a finite number")
    click.echo(json.dumps(clean, indent=2, ensure_ascii=False, allow_nan=False))


def _clean(value: Any, path: str, undefined: list[str]) -> Any:
    """Return ``value`` in JSON's own types; numpy's are recognised by ``item`` and ``tolist``."""
    if isinstance(value, Mapping):
        return {str(k): _clean(v, f"{path}.{k}", undefined) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one, f"{path}[{at}]", undefined) for at, one in enumerate(value)]
    if hasattr(value, "tolist"):
        return _clean(value.tolist(), path, undefined)
    if isinstance(value, float) and not math.isfinite(value):
        undefined.append(path)
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def records(table: Any) -> list[dict[str, Any]]:
    """Return a data frame's rows as dictionaries; pandas' missing values become None."""
    rows: list[dict[str, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers_from: int = 1
) -> None:
    """Print an aligned table; columns from ``numbers_from`` on are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for at, name in enumerate(columns):
        table.add_column(
            Text(name),
            justify="right" if at >= numbers_from else "left",
            overflow="fold",
            no_wrap=at >= numbers_from,
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print aligned ``name  value`` lines."""
    lines = list(facts)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}")


def decimals(value: float | None) -> str:
    """Return a number in four significant digits, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 10000:
        return f"{value:.4g}"
    return f"{value:.2e}"


def fraction(value: float | None) -> str:
    """Return a number of order one in three decimals; small ones keep two digits that matter."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Return a falling spectrum as bars, relative to its first value."""
    if not len(values) or not values[0] > 0:
        return ""
    step = max(1, math.ceil(len(values) / width))
    top = len(_BARS) - 1
    return "".join(_BARS[round(top * min(v / values[0], 1.0))] for v in values[::step])
