"""Examples from the rows of data files: choose columns and objective, check rows, split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError
from lora_analysis.patterns import natural_key, near_names
from lora_analysis.training.data_files import Rows, read_datasets, read_rows
from lora_analysis.training.demo_data import docstring_rows
from lora_analysis.training.inputs import data_paths
from lora_analysis.training.options import DOCSTRINGS

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.options import DataOptions, Objective

# Common names of columns, the most likely first; used if no option names the column.
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
    """One example; ``label`` is the index of a class, a number, or None."""

    text: str = ""
    pair: str | None = None
    completion: str | None = None
    image: str | None = None
    label: float | int | None = None


@dataclass(slots=True)
class Examples:
    """Training and test examples, their objective, and notes on rows that were left out."""

    train: list[Example]
    test: list[Example]
    objective: Objective
    labels: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    folder: Path = field(default_factory=Path)
    columns: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the description of the data for the manifest."""
        return {
            "objective": self.objective,
            "labels": list(self.labels),
            "columns": dict(self.columns),
            "examples": {"train": len(self.train), "test": len(self.test)},
            "left_out": self.notes,
        }


def read_examples(config: RunConfig) -> Examples:
    """Read the examples of a run's data.

    Raises
    ------
    InputError
        A column is missing or not clear, there is only one class, or too few rows are left.
    MalformedFileError, SourceError, MissingExtraError
        The file cannot be read.
    """
    data = config.data
    test: Rows | None = None
    if data.source == DOCSTRINGS:
        train = docstring_rows(config.task)
    elif data.format == "datasets":
        test = read_datasets(data.source, data.test or "test", data.limit)
        test = test if test.rows else None
        train = read_datasets(data.source, "train", data.limit)
    else:
        files = {
            role: read_rows(path, format=data.format, limit=data.limit)
            for role, path in data_paths(data).items()
        }
        train, test = files["data"], files.get("test")
    names = list(dict.fromkeys(key for _, row in train.rows for key in row))
    columns = _find_columns(data, names, train.source)
    objective = _choose_objective(config.objective, columns, train)
    columns = _select_columns(objective, columns, names, train.source)
    labels = _find_classes(train, columns, objective)
    splits = [_convert_rows(rows, columns, objective, labels) for rows in (train, test) if rows]
    notes = [note for rows in (train, test) if rows for note in rows.notes()]
    if test is None:
        splits = list(_hold_out(splits[0], data.test_share))
    if min(map(len, splits)) < 1:
        message = (
            f"{train.source}: {len(splits[0])} rows to train on and {len(splits[1])} to test on "
            f"are left; both need at least one. {' '.join(notes)}"
        )
        raise InputError(message)
    folder = Path(data.source).parent
    return Examples(splits[0], splits[1], objective, labels, notes, folder, columns)


def _find_columns(data: DataOptions, names: Sequence[str], source: str) -> dict[str, str]:
    """Return the column of each role: the one in the options, else the first common name."""
    columns: dict[str, str] = {}
    lower = {name.lower(): name for name in reversed(names)}
    for role, likely in _NAMES.items():
        option = getattr(data, role)
        if option is not None and option not in names:
            near = ", ".join(near_names(option, names) or names)
            message = f"{source} has no column '{option}' for {role}. Its columns: {near}."
            raise InputError(message)
        column = option or next((lower[name] for name in likely if name in lower), None)
        if column is not None and (option or column not in columns.values()):
            columns[role] = column
    return columns


def _choose_objective(option: Objective, columns: Mapping[str, str], rows: Rows) -> Objective:
    if option != "auto":
        return option
    if "label" not in columns:
        return "causal-lm"
    if "image" in columns and "text" not in columns:
        return "image-classification"
    values = [row.get(columns["label"]) for _, row in rows.rows]
    fractions = [value for value in values if _is_fraction(value)]
    return "regression" if len(fractions) > len(values) / 2 else "classification"


def _is_fraction(value: object) -> bool:
    """Return True if a label is a number with a decimal point, and therefore a measurement."""
    if isinstance(value, float):
        return not value.is_integer()
    try:
        return isinstance(value, str) and "." in value and math.isfinite(float(value))
    except ValueError:
        return False


def _select_columns(
    objective: Objective, columns: Mapping[str, str], names: Sequence[str], source: str
) -> dict[str, str]:
    """Return the columns that an objective uses; raise if one is missing."""
    needed = _NEEDED.get(objective)
    if needed is None:  # causal language model
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


def _find_classes(rows: Rows, columns: Mapping[str, str], objective: Objective) -> tuple[str, ...]:
    if objective not in ("classification", "image-classification"):
        return ()
    labels = {str(row.get(columns["label"])).strip() for _, row in rows.rows} - {"", "None"}
    if len(labels) < 2:
        message = (
            f"{rows.source}: the column '{columns['label']}' holds one class, "
            f"{', '.join(labels) or 'none'}; a classification needs two."
        )
        raise InputError(message)
    if len(labels) > len(rows.rows) / 2 and len(labels) > 20:
        message = (
            f"{rows.source}: the column '{columns['label']}' holds {len(labels)} different values "
            f"in {len(rows.rows)} rows; is it a class? For numbers, use the objective regression."
        )
        raise InputError(message)
    return tuple(sorted(labels, key=natural_key))


def _convert_rows(
    rows: Rows, columns: Mapping[str, str], objective: Objective, labels: Sequence[str]
) -> list[Example]:
    """Return the examples of rows; rows without a needed value become bad rows."""
    class_indices = {name: index for index, name in enumerate(labels)}
    examples = []
    for line, row in list(rows.rows):
        example = _convert_row(row, columns, objective, class_indices)
        if isinstance(example, str):
            rows.bad.append((line, example))
        else:
            examples.append(example)
    bad_lines = {line for line, _ in rows.bad}
    rows.rows = [(line, row) for line, row in rows.rows if line not in bad_lines]
    return examples


def _convert_row(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    objective: Objective,
    class_indices: Mapping[str, int],
) -> Example | str:
    """Return the example of a row, or the reason why it cannot be used."""
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
            return f"'{columns['label']}' is not a number: {text['label'][:40]!r}"
    elif "label" in text:
        label = class_indices.get(text["label"].strip())
        if label is None:
            value = text["label"][:40]
            return f"'{columns['label']}' is not a class of the training rows: {value!r}"
    return Example(
        text.get("prompt") or text.get("text", ""),
        text.get("text_pair"),
        text.get("completion"),
        text.get("image"),
        label,
    )


def _hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split by a hash of each example: the test rows depend on neither order nor seeds.

    Rows with the same content are in the same split.
    """
    digests = [
        hashlib.blake2b(repr(example).encode(), digest_size=8).digest() for example in examples
    ]
    threshold = sorted(digests)[max(1, round(share * len(digests))) - 1] if digests else b""
    pairs = list(zip(digests, examples, strict=True))
    test = [example for digest, example in pairs if digest <= threshold]
    train = [example for digest, example in pairs if digest > threshold]
    return train, test
