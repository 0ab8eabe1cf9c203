"""Readers of data files: JSONL, CSV, TSV, Parquet, plain text, E2E and GLUE.

A row that cannot be read is counted and reported, with its line and the reason.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

from lora_analysis.errors import InputError, MalformedFileError, require_package
from lora_analysis.storage.documents import parse_json
from lora_analysis.storage.limits import (
    MAX_CELL_CHARACTERS,
    MAX_DATA_CHARACTERS,
    MAX_DATA_FIELDS,
    MAX_DATA_ROWS,
    MAX_LINE_CHARACTERS,
)

if TYPE_CHECKING:
    from lora_analysis.training.options import DataFormat

Row = Mapping[str, Any]

_BY_SUFFIX: Final[Mapping[str, DataFormat]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
# CoLA's files have no header: source, label, the authors' original mark, sentence.
_COLA: Final = ("source", "label", "mark", "sentence")
_TOO_LONG: Final = f"longer than {MAX_LINE_CHARACTERS:,} characters"
# GLUE's names of columns, by the names of this module.
_GLUE_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("sentence1", "#1 String", "question1", "question", "sentence"),
    "text_pair": ("sentence2", "#2 String", "question2", "sentence"),
    "label": ("gold_label", "label", "Quality", "is_duplicate", "score"),
}


@dataclass(slots=True)
class Rows:
    """Rows of a file with their line numbers, and bad rows with the reason."""

    source: str
    rows: list[tuple[int, Row]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    cut: int = 0
    characters: int = 0

    def add(self, line: int, row: Row | str) -> None:
        """Add a row, with long cells cut, or the reason why it cannot be used.

        Raises
        ------
        InputError
            There are more rows or characters than the limits allow.
        """
        if isinstance(row, str) or len(row) > MAX_DATA_FIELDS:
            reason = row if isinstance(row, str) else f"{len(row):,} fields, too many"
            self.bad.append((line, reason))
        else:
            self.rows.append((line, self._truncate(row)))
        count = len(self.rows) + len(self.bad)
        if count > MAX_DATA_ROWS or self.characters > MAX_DATA_CHARACTERS:
            message = (
                f"{self.source}: more than {MAX_DATA_ROWS:,} rows or {MAX_DATA_CHARACTERS:,} "
                f"characters (line {line:,}). Pass a limit (command line: --limit), or a part."
            )
            raise InputError(message)

    def _truncate(self, row: Row) -> Row:
        """Return a row with its texts truncated to the maximum length."""
        long = [
            name
            for name, cell in row.items()
            if isinstance(cell, str) and len(cell) > MAX_CELL_CHARACTERS
        ]
        if long:
            self.cut += len(long)
            row = {**row, **{name: row[name][:MAX_CELL_CHARACTERS] for name in long}}
        self.characters += sum(len(cell) for cell in row.values() if isinstance(cell, str))
        return row

    def notes(self) -> list[str]:
        """Return sentences on rows left out (how many, where, why) and on cells that are cut."""
        notes = []
        if self.bad:
            count = len(self.bad) + len(self.rows)
            lines = "; ".join(f"line {line}: {reason}" for line, reason in sorted(self.bad)[:3])
            more = f"; and {len(self.bad) - 3} more" if len(self.bad) > 3 else ""
            notes.append(
                f"{self.source}: {len(self.bad)} of {count} rows are left out ({lines}{more})."
            )
        if self.cut:
            cells = "1 cell is" if self.cut == 1 else f"{self.cut:,} cells are"
            notes.append(f"{self.source}: {cells} cut to {MAX_CELL_CHARACTERS:,} characters.")
        return notes


def read_rows(path: Path, *, format: DataFormat = "auto", limit: int | None = None) -> Rows:
    """Read the rows of a file, each a mapping of column names to values.

    Plain text has the column ``text``; E2E (``slots || reference``) has ``prompt`` and
    ``completion``; GLUE has ``text``, ``text_pair`` and ``label`` in place of its own names.

    Parameters
    ----------
    path
        The file.
    format
        File format; ``"auto"`` goes by the file name, and recognizes E2E in a text file.
    limit
        Maximum number of rows to read.

    Raises
    ------
    InputError
        The format is not clear from the file name.
    MalformedFileError
        The file is empty, has no header or too many columns, or is not text.
    MissingExtraError
        The format is Parquet, and pyarrow is not installed.
    """
    kind = format if format != "auto" else _BY_SUFFIX.get(path.suffix.lower())
    if format == "auto" and kind == "text":
        # All of the first lines of E2E are ``slot : value | … || reference``.
        with path.open(encoding="utf-8", errors="replace") as stream:
            starts = (stream.readline(2**16) for _ in range(8))
            parts = [line.partition("||") for line in starts if line.strip()]
        is_e2e = all(
            reference.strip() and all(" : " in slot for slot in slots.split("|"))
            for slots, _, reference in parts
        )
        kind = "e2e" if parts and is_e2e else "text"
    if kind is None or kind not in _READERS:
        message = (
            f"{path}: how to read it is not clear from its name. Pass a format "
            f"(command line: --data-format): {', '.join(_READERS)}."
        )
        raise InputError(message)
    rows = Rows(path.name)
    try:
        for line, row in islice(_READERS[kind](path), limit):
            rows.add(line, row)
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 text at byte {error.start}; does it have another format?"
        raise MalformedFileError(message) from error
    if not rows.rows:
        first = f" (line {rows.bad[0][0]}: {rows.bad[0][1]})" if rows.bad else ""
        message = f"{path}: no row of {kind} could be read{first}."
        raise MalformedFileError(message)
    return rows


# A reader yields (line, row), or (line, reason) for a row that cannot be used.
_Lines = Iterator[tuple[int, Row | str]]


def _read_jsonl(path: Path) -> _Lines:
    with path.open(encoding="utf-8") as stream:
        for line, text in _lines(stream):
            if text is None:
                yield line, _TOO_LONG
                continue
            if not text.strip():
                continue
            try:
                row = parse_json(text)
            except ValueError as error:
                yield line, f"not JSON ({error})"
                continue
            yield line, row if isinstance(row, dict) else f"a {type(row).__name__}, not an object"


def _lines(stream: TextIO) -> Iterator[tuple[int, str | None]]:
    """Yield lines with their numbers; None for a line that is too long, skipped in parts."""
    number = 0
    while text := stream.readline(MAX_LINE_CHARACTERS):
        number += 1
        if len(text) < MAX_LINE_CHARACTERS or text.endswith("\n"):
            yield number, text
            continue
        while text and not text.endswith("\n"):
            text = stream.readline(MAX_LINE_CHARACTERS)
        yield number, None


def _whole_lines(path: Path, stream: TextIO) -> Iterator[str]:
    """Yield lines; raise for one that is too long, because a row may end anywhere in it."""
    for number, text in _lines(stream):
        if text is None:
            message = f"{path}: line {number:,} is {_TOO_LONG}."
            raise MalformedFileError(message)
        yield text


def _read_tsv(path: Path) -> _Lines:
    """Yield tab-separated rows; a file with GLUE's columns is read without quotes, as GLUE is."""
    with path.open(encoding="utf-8", newline="") as stream:
        first = stream.readline(2**20).rstrip("\r\n").split("\t")
    if _is_cola(first) or set(first) & {"#1 String", "gold_label", "is_duplicate"}:
        yield from _read_glue(path)
    else:
        yield from _read_delimited(path, "\t", csv.QUOTE_MINIMAL)


def _read_delimited(
    path: Path, delimiter: str, quoting: Literal[0, 3], header: Iterable[str] | None = None
) -> _Lines:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        # A field may be longer than the default limit of csv.
        csv.field_size_limit(MAX_LINE_CHARACTERS)
        reader = csv.reader(_whole_lines(path, stream), delimiter=delimiter, quoting=quoting)
        names = list(header) if header else next(reader, [])
        if len(names) > MAX_DATA_FIELDS:
            message = f"{path}: {len(names):,} columns (limit {MAX_DATA_FIELDS:,})."
            raise MalformedFileError(message)
        if len(set(names)) != len(names):
            message = f"{path}: two columns of the header have the same name: {', '.join(names)}."
            raise MalformedFileError(message)
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:  # the beginning of the next row is unknown then
                message = f"{path}: line {reader.line_num:,}: {error}. Is a quote missing?"
                raise MalformedFileError(message) from error
            if fields is None:
                return
            if not fields:
                continue
            fits = len(fields) == len(names)
            reason = f"{len(fields)} fields where the header has {len(names)}"
            yield reader.line_num, dict(zip(names, fields, strict=True)) if fits else reason


def _read_glue(path: Path) -> _Lines:
    with path.open(encoding="utf-8", newline="") as stream:
        first = stream.readline(2**20).rstrip("\r\n").split("\t")
    header = _COLA if _is_cola(first) else None
    names = header or first
    columns = {
        role: next((name for name in usual if name in names), None)
        for role, usual in _GLUE_NAMES.items()
    }
    if columns["text_pair"] == columns["text"]:
        columns["text_pair"] = None
    for line, row in _read_delimited(path, "\t", csv.QUOTE_NONE, header):
        if isinstance(row, str):
            yield line, row
        elif row.get(columns["label"] or "") == "-":
            yield line, "no label that annotators agree on"
        else:
            yield line, {role: row[name] for role, name in columns.items() if name}


def _is_cola(first: list[str]) -> bool:
    return len(first) == len(_COLA) and first[1] in ("0", "1") and first[2] in ("", "*")


def _read_parquet(path: Path) -> _Lines:
    require_package("pyarrow", "parquet", f"{path}: Parquet")
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # ArrowInvalid
        message = f"{path}: not a Parquet file ({error})."
        raise MalformedFileError(message) from error
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _read_paragraphs(path: Path) -> _Lines:
    """Yield paragraphs, separated by empty lines."""
    with path.open(encoding="utf-8") as stream:
        paragraph_lines: list[str] = []
        start = 1
        for line, text in _lines(stream):
            if text is None:
                yield line, _TOO_LONG
            elif text.strip():
                start = start if paragraph_lines else line
                paragraph_lines.append(text.rstrip("\r\n"))
            elif paragraph_lines:
                yield start, {"text": "\n".join(paragraph_lines)}
                paragraph_lines = []
        if paragraph_lines:
            yield start, {"text": "\n".join(paragraph_lines)}


def _read_e2e(path: Path) -> _Lines:
    with path.open(encoding="utf-8") as stream:
        for line, text in _lines(stream):
            if text is None:
                yield line, _TOO_LONG
                continue
            if not text.strip():
                continue
            slots, bars, reference = text.rstrip("\r\n").partition("||")
            if bars and slots.strip() and reference.strip():
                # As in the LoRA paper's code, the bars end the prompt.
                yield line, {"prompt": f"{slots.strip()} ||", "completion": f" {reference.strip()}"}
            else:
                yield line, "not of the form 'slots || reference'"


_READERS: Final[Mapping[str, Callable[[Path], _Lines]]] = {
    "jsonl": _read_jsonl,
    "csv": partial(_read_delimited, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "text": _read_paragraphs,
    "e2e": _read_e2e,
    "glue": _read_glue,
}


def read_datasets(name: str, split: str, limit: int | None = None) -> Rows:
    """Read the rows of one split of a data set with the package ``datasets``.

    Parameters
    ----------
    name
        Name on a hub, or ``name:configuration``.
    split
        ``"train"``, ``"test"``, …; no rows if the data set does not have it.

    Raises
    ------
    MissingExtraError
        The package is not installed.
    """
    require_package("datasets", "train", f"The data set '{name}'")
    import datasets

    identifier, _, configuration = name.partition(":")
    dataset = datasets.load_dataset(identifier, configuration or None)
    rows = Rows(f"{name} ({split})")
    if split in dataset:
        for number, row in enumerate(islice(iter(dataset[split]), limit), 1):
            rows.add(number, row)
    return rows
