"""From rows to examples: which columns are meant, which rows serve, and what is tested."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError
from lora_analysis.patterns import natural_key, near_names
from lora_analysis.training.inputs import data_places
from lora_analysis.training.options import DOCSTRINGS
from lora_analysis.training.tables import Rows, read_datasets, read_rows

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.options import DataOptions, Objective

# The commonest names of a column, the likeliest first; used where no option names it.
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text", "sentence", "sentence1", "content", "review", "document", "question1"),
    "text_pair": ("text_pair", "sentence2", "question2", "hypothesis"),
    "label": ("label", "labels", "class", "category", "target", "sentiment"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "completion": ("completion", "response", "output", "answer"),
    "image": ("image", "image_path", "file", "path"),
}
_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "classification": ("text", "label"),
    "regression": ("text", "label"),
    "image-classification": ("image", "label"),
    "masked-lm": ("text",),
}


@dataclass(frozen=True, slots=True)
class Example:
    """One row as a task has it; ``label`` is a class's number, a number, or None."""

    text: str = ""
    pair: str | None = None
    completion: str | None = None
    image: str | None = None
    label: float | int | None = None


@dataclass(slots=True)
class Examples:
    """What is trained and tested on, what it is for, and what was left out."""

    train: list[Example]
    test: list[Example]
    objective: Objective
    labels: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    folder: Path = field(default_factory=Path)
    columns: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what the manifest says of the data."""
        return {
            "objective": self.objective,
            "labels": list(self.labels),
            "columns": dict(self.columns),
            "examples": {"train": len(self.train), "test": len(self.test)},
            "left_out": self.notes,
        }


def read_examples(config: RunConfig) -> Examples:
    """Return the examples of a run's data.

    Raises
    ------
    InputError
        A column is not there or not named, one class alone is there, or too few rows are left.
    MalformedFileError, SourceError, MissingExtraError
        The file cannot be read.
    """
    train, test = _rows(config)
    names = list(dict.fromkeys(key for _, row in train.rows for key in row))
    columns = _columns(config.data, names, train.source)
    objective = _objective(config.objective, columns, train)
    columns = _needed_columns(objective, columns, names, train.source)
    labels = _classes(train, columns, objective)
    kept = [_examples(rows, columns, objective, labels) for rows in (train, test) if rows]
    notes = [note for rows in (train, test) if rows for note in rows.notes()]
    if test is None:
        kept = list(_held_back(kept[0], config.data.test_share))
    if min(map(len, kept)) < 1:
        message = (
            f"{train.source}: {len(kept[0])} rows to train on and {len(kept[1])} to test on are "
            f"left; both need one at least. {' '.join(notes)}"
        )
        raise InputError(message)
    folder = Path(config.data.source).parent
    return Examples(kept[0], kept[1], objective, labels, notes, folder, columns)


def _rows(config: RunConfig) -> tuple[Rows, Rows | None]:
    data = config.data
    if data.source == DOCSTRINGS:
        from lora_analysis.training.docstrings import docstring_rows

        return docstring_rows(config.task)
    if data.format == "datasets":
        test = read_datasets(data.source, data.test or "test", data.limit)
        return read_datasets(data.source, "train", data.limit), test if test.rows else None
    places = data_places(data)
    train, *rest = (
        read_rows(path, format=data.format, limit=data.limit) for path in places.values()
    )
    return train, rest[0] if rest else None


def _columns(data: DataOptions, names: Sequence[str], source: str) -> dict[str, str]:
    """Return the column of each role: the one that is named, else the likeliest there is."""
    found: dict[str, str] = {}
    lower = {name.lower(): name for name in reversed(names)}
    for role, likely in _NAMES.items():
        named = getattr(data, role)
        if named is not None and named not in names:
            near = ", ".join(near_names(named, names) or names)
            message = f"{source} has no column '{named}' for {role}. Its columns: {near}."
            raise InputError(message)
        column = named or next((lower[name] for name in likely if name in lower), None)
        if column is not None and (named or column not in found.values()):
            found[role] = column
    return found


def _objective(asked: Objective, columns: Mapping[str, str], rows: Rows) -> Objective:
    if asked != "auto":
        return asked
    if "label" not in columns:
        return "causal-lm"
    if "image" in columns and "text" not in columns:
        return "image-classification"
    values = [row.get(columns["label"]) for _, row in rows.rows]
    fractions = [value for value in values if _is_fraction(value)]
    return "regression" if len(fractions) > len(values) / 2 else "classification"


def _is_fraction(value: object) -> bool:
    """Say whether a label is a number that is written with a point, and so measured."""
    if isinstance(value, float):
        return not value.is_integer()
    try:
        return isinstance(value, str) and "." in value and math.isfinite(float(value))
    except ValueError:
        return False


def _needed_columns(
    objective: Objective, columns: Mapping[str, str], names: Sequence[str], source: str
) -> dict[str, str]:
    """Return the columns an objective uses; raise where one it needs is not known."""
    needed = _NEEDED.get(objective)
    if needed is None:  # a causal language model's
        needed = ("prompt", "completion") if {"prompt", "completion"} <= set(columns) else ("text",)
    for role in needed:
        if role not in columns:
            message = (
                f"{source}: which column is the {role} is not clear from the names "
                f"{', '.join(names)}. Name it (command line: --{role}-column)."
            )
            raise InputError(message)
    pair = ("text_pair",) if "label" in needed and "text_pair" in columns else ()
    return {role: columns[role] for role in (*needed, *pair)}


def _classes(rows: Rows, columns: Mapping[str, str], objective: Objective) -> tuple[str, ...]:
    if objective not in ("classification", "image-classification"):
        return ()
    found = {str(row.get(columns["label"])).strip() for _, row in rows.rows} - {"", "None"}
    if len(found) < 2:
        message = (
            f"{rows.source}: the column '{columns['label']}' holds one class, "
            f"{', '.join(found) or 'none'}; a classification needs two."
        )
        raise InputError(message)
    if len(found) > len(rows.rows) / 2 and len(found) > 20:
        message = (
            f"{rows.source}: the column '{columns['label']}' holds {len(found)} different values "
            f"in {len(rows.rows)} rows; is it a class? For a number, ask for regression."
        )
        raise InputError(message)
    return tuple(sorted(found, key=natural_key))


def _examples(
    rows: Rows, columns: Mapping[str, str], objective: Objective, labels: Sequence[str]
) -> list[Example]:
    """Return the rows that have what they need; the others become bad ones."""
    numbers = {name: at for at, name in enumerate(labels)}
    found = []
    for line, row in list(rows.rows):
        made = _example(row, columns, objective, numbers)
        if isinstance(made, str):
            rows.bad.append((line, made))
        else:
            found.append(made)
    gone = {line for line, _ in rows.bad}
    rows.rows = [(line, row) for line, row in rows.rows if line not in gone]
    return found


def _example(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    objective: Objective,
    numbers: Mapping[str, int],
) -> Example | str:
    """Return a row's example, or why it is none."""
    values = {role: row.get(column) for role, column in columns.items()}
    empty = [columns[role] for role, v in values.items() if v is None or not str(v).strip()]
    if empty:
        return f"'{empty[0]}' is empty"
    text = {role: str(value) for role, value in values.items()}
    label: float | int | None = None
    if objective == "regression":
        try:
            label = float(text["label"])
        except ValueError:
            label = math.nan
        if not math.isfinite(label):
            return f"'{columns['label']}' is no number: {text['label'][:40]!r}"
    elif "label" in text:
        label = numbers.get(text["label"].strip())
        if label is None:
            return f"'{columns['label']}' is no class of the training rows: {text['label'][:40]!r}"
    return Example(
        text.get("prompt") or text.get("text", ""),
        text.get("text_pair"),
        text.get("completion"),
        text.get("image"),
        label,
    )


def _held_back(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split by a hash of each example: the same rows are tested, whatever the order and seeds.

    Rows of the same content go to one side.
    """

    def place(example: Example) -> bytes:
        return hashlib.blake2b(repr(example).encode(), digest_size=8).digest()

    ranked = sorted(examples, key=place)
    first = place(ranked[max(1, round(share * len(ranked))) - 1]) if ranked else b""
    test = [example for example in examples if place(example) <= first]
    train = [example for example in examples if place(example) > first]
    return train, test
