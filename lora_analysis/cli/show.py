"""Printing: tables for people, one strict JSON document for programs."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import combining, east_asian_width

import click

from lora_analysis.text import name_options, printable, printable_json

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study

SCHEMA_VERSION = 1

_BARS = "▁▂▃▄▅▆▇█"
# Width of piped output, which is never folded.
_UNLIMITED = 10_000


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document; non-finite numbers become null and are listed with their path."""
    undefined: list[str] = []
    clean = {"schema_version": SCHEMA_VERSION, **_as_json_value(document, "$", undefined)}
    if undefined:
        clean["undefined"] = dict.fromkeys(undefined, "not defined or not known")
    text = json.dumps(clean, indent=2, ensure_ascii=False, allow_nan=False)
    click.echo(printable_json(text))


def _as_json_value(value: Any, path: str, undefined: list[str]) -> Any:
    """Return ``value`` in JSON's own types; numpy's are recognized by ``tolist``."""
    if isinstance(value, Mapping):
        return {str(k): _as_json_value(v, f"{path}.{k}", undefined) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [
            _as_json_value(item, f"{path}[{index}]", undefined) for index, item in enumerate(value)
        ]
    if hasattr(value, "tolist"):
        return _as_json_value(value.tolist(), path, undefined)
    if isinstance(value, float) and not math.isfinite(value):
        undefined.append(path)
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def study_facts(study: Study) -> dict[str, Any]:
    """Return a study's adapters, findings, excluded modules and failures for JSON output."""
    from lora_analysis.conclusions import findings

    return {
        "adapters": list(study.adapters),
        "findings": [finding.to_dict() for finding in findings(study)],
        "left_out": [
            {"module": module, "code": "no-base-weight", "reason": reason}
            for module, reason in study.unmatched.items()
        ],
        "failures": [failure.to_dict() for failure in study.failures],
    }


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a data frame's rows as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def page_width() -> int:
    """Return the columns of the terminal, or of ``COLUMNS``; without either, no limit."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return _UNLIMITED


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    footer: Sequence[object] = (),
    numbers_from: int = 1,
    cut_names: bool = True,
) -> None:
    """Print an aligned table; columns from ``numbers_from`` on are right-aligned.

    If it is wider than the page, module names in the first column lose their common prefix
    (unless ``cut_names`` is false), and columns move closer.
    """
    width = page_width()
    body = [[printable(str(cell)) for cell in row] for row in rows]
    last = [[printable(str(cell)) for cell in footer]] if footer else []
    start = _common_start(row[0] for row in body) if cut_names else ""
    if start and _width([columns, *body, *last]) > width:
        body = [[row[0].removeprefix(start), *row[1:]] for row in body]
        title = ", ".join(filter(None, (title, f"names without '{start}'")))
    if title:
        click.echo(printable(title))
    table = [list(columns), *body, *last]
    fits = _width(table) <= width
    if fits and _is_plain(table):
        lines = _align_columns(table, numbers_from)
    else:
        lines = _fold_cells(table, numbers_from, width, close=not fits)
    # Through click, which tells a closed pipe from other errors.
    click.echo("\n".join(line.rstrip() for line in lines))


def _is_plain(table: Sequence[Sequence[str]]) -> bool:
    """Return True if every character is one column wide and none moves the cursor."""
    cells = "".join(cell for row in table for cell in row)
    return cells.isprintable() and not any(
        east_asian_width(character) in "WF" or combining(character) for character in set(cells)
    )


def _common_start(names: Iterable[str]) -> str:
    """Return the leading segments that all dotted names share.

    A name without dots (a head, an ellipsis) has none to cut.
    """
    parents = [name.split(".")[:-1] for name in names if "." in name]
    levels = zip(*parents, strict=False) if len(parents) > 1 else ()
    same = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    return "".join(f"{level[0]}." for level in same)


def _align_columns(table: Sequence[Sequence[str]], numbers_from: int) -> list[str]:
    """Return the lines of a table that fits; rich's layout takes as long to import as numpy."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index >= numbers_from else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def _fold_cells(
    rows: Sequence[Sequence[str]], numbers_from: int, width: int, *, close: bool
) -> list[str]:
    """Return the lines of any table, with cells folded if it is too wide."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if close else (0, 1))
    for index, name in enumerate(rows[0]):
        number = index >= numbers_from
        justify = "right" if number else "left"
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=number)  # type: ignore[arg-type]  # a literal
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console = Console(width=width)
    with console.capture() as printed:
        console.print(table)
    return printed.get().splitlines()


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Return the width of a table with two spaces between columns."""
    size: Callable[[str], int] = len
    if not _is_plain(rows):
        from rich.cells import cell_len as size

    widths = [max(map(size, column)) for column in zip(*rows, strict=True)]
    return sum(widths) + 2 * (len(widths) - 1)


def print_text(text: str) -> None:
    """Print a paragraph, wrapped to the page."""
    click.echo(click.wrap_text(printable(name_options(text)), width=page_width()))


# Colors by severity, which is also printed as the first word.
_KINDS = {
    "artifact": "yellow",
    "damage": "red",
    "failure": "red",
    "limit": "bright_black",
    "result": "blue",
}


def print_finding(kind: str, text: str) -> None:
    """Print a finding: its kind, colored on a terminal unless NO_COLOR is set, and its text."""
    lines = click.wrap_text(printable(name_options(text)), page_width(), f"{kind:<10} ", " " * 11)
    label, rest = lines[: len(kind)], lines[len(kind) :]
    color = None if os.environ.get("NO_COLOR") else _KINDS.get(kind)
    click.echo((click.style(label, fg=color, bold=True) if color else label) + rest)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print aligned ``name  value`` lines."""
    lines = list(facts)
    indent = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        first = f"{name:<{indent}}"
        if isinstance(value, Path):
            click.echo(f"{first}{printable(str(value))}")  # to be copied: never broken
            continue
        wrapped = textwrap.wrap(
            printable(name_options(str(value))),
            page_width(),
            initial_indent=first,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        click.echo("\n".join(wrapped) or first)


def decimals(value: float | None) -> str:
    """Return a number for a table: three decimals near one, a dash if there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 10_000:
        digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
        return f"{value:.{digits}f}"
    return f"{value:.2g}" if 1e-4 <= abs(value) < 1 else f"{value:.1e}"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Return a falling spectrum as bars, relative to its first value."""
    if not len(values) or not values[0] > 0:
        return ""
    step = max(1, math.ceil(len(values) / width))
    top = len(_BARS) - 1
    return "".join(_BARS[round(top * min(v / values[0], 1.0))] for v in values[::step])
