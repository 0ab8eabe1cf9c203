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
    from lora_analysis.training.options import Objective

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
    objective, columns = _choose_columns(config, names, train)
    labels = _find_classes(train, columns, objective)
    splits = [_convert_rows(rows, columns, objective, labels) for rows in (train, test) if rows]
    notes = [note for rows in (train, test) if rows for note in rows.notes()]
    if test is None:
        # Split by a hash of each example: the test rows depend on neither order nor seeds, and
        # rows with the same content are in the same split.
        digests = [
            hashlib.blake2b(repr(example).encode(), digest_size=8).digest() for example in splits[0]
        ]
        last = max(1, round(data.test_share * len(digests))) - 1
        threshold = sorted(digests)[last] if digests else b""
        pairs = list(zip(digests, splits[0], strict=True))
        splits = [
            [example for digest, example in pairs if digest > threshold],
            [example for digest, example in pairs if digest <= threshold],
        ]
    if min(map(len, splits)) < 1:
        message = (
            f"{train.source}: {len(splits[0])} rows to train on and {len(splits[1])} to test on "
            f"are left; both need at least one. {' '.join(notes)}"
        )
        raise InputError(message)
    folder = Path(data.source).parent
    return Examples(splits[0], splits[1], objective, labels, notes, folder, columns)


def _choose_columns(
    config: RunConfig, names: Sequence[str], rows: Rows
) -> tuple[Objective, dict[str, str]]:
    """Return the objective of a run, and the columns that it uses by role.

    The column of a role is the one in the options, else the first with a common name.
    """
    columns: dict[str, str] = {}
    lower = {name.lower(): name for name in reversed(names)}
    for role, likely in _NAMES.items():
        option = getattr(config.data, role)
        if option is not None and option not in names:
            near = ", ".join(near_names(option, names) or names)
            message = f"{rows.source} has no column '{option}' for {role}. Its columns: {near}."
            raise InputError(message)
        column = option or next((lower[name] for name in likely if name in lower), None)
        if column is not None and (option or column not in columns.values()):
            columns[role] = column
    objective = config.objective
    if objective == "auto" and "label" not in columns:
        objective = "causal-lm"
    elif objective == "auto" and "image" in columns and "text" not in columns:
        objective = "image-classification"
    elif objective == "auto":
        fractions = [_is_fraction(row.get(columns["label"])) for _, row in rows.rows]
        objective = "regression" if sum(fractions) > len(fractions) / 2 else "classification"
    has_completions = {"prompt", "completion"} <= set(columns)
    causal = ("prompt", "completion") if has_completions else ("text",)
    needed = _NEEDED.get(objective, causal)
    for role in needed:
        if role not in columns:
            message = (
                f"{rows.source}: which column is the {role} is not clear from the names "
                f"{', '.join(names)}. Name it (command line: --{role}-column)."
            )
            raise InputError(message)
    pair = ("text_pair",) if "label" in needed and "text_pair" in columns else ()
    return objective, {role: columns[role] for role in (*needed, *pair)}


def _is_fraction(value: object) -> bool:
    """Return True if a label is a number with a decimal point, and therefore a measurement."""
    if isinstance(value, float):
        return not value.is_integer()
    try:
        return isinstance(value, str) and "." in value and math.isfinite(float(value))
    except ValueError:
        return False


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
    """Return the examples of rows; rows that cannot be used become bad rows, with the reason."""
    class_indices = {name: index for index, name in enumerate(labels)}
    examples = []
    usable = []
    for line, row in rows.rows:
        text = {role: str(row.get(column)) for role, column in columns.items()}
        empty = [
            column
            for role, column in columns.items()
            if row.get(column) is None or not text[role].strip()
        ]
        if empty:
            rows.bad.append((line, f"'{empty[0]}' is empty"))
            continue
        label: float | int | None = None
        if objective == "regression":
            try:
                label = float(text["label"])
            except ValueError:
                label = math.nan
            if not math.isfinite(label):
                reason = f"'{columns['label']}' is not a number: {text['label'][:40]!r}"
                rows.bad.append((line, reason))
                continue
        elif "label" in text:
            label = class_indices.get(text["label"].strip())
            if label is None:
                value = text["label"][:40]
                reason = f"'{columns['label']}' is not a class of the training rows: {value!r}"
                rows.bad.append((line, reason))
                continue
        usable.append((line, row))
        examples.append(
            Example(
                text.get("prompt") or text.get("text", ""),
                text.get("text_pair"),
                text.get("completion"),
                text.get("image"),
                label,
            )
        )
    rows.rows = usable
    return examples
