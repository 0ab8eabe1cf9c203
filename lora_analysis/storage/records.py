"""Records and marks that identify the files that this package wrote.

A folder of results contains ``.lora_analysis/KIND.json``: the verb that wrote it, its settings,
and the name, size and hash of every file of ours. It is written before the first file, so that an
interrupted run is recognized, and only files in it are ever replaced or deleted unasked.

Single files carry a mark. Every file of tensors states the version of the package in its metadata,
which other programs ignore: safetensors under `KEY` as JSON, GGUF as the value
``lora_analysis.version``. Figures (SVG, PNG, PDF) name the package as their creator. The mark of
weights also has the digest of the configuration that was written with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from lora_analysis import __version__
from lora_analysis.errors import InputError, UnfinishedError
from lora_analysis.finding import Finding
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.documents import parse_json_object, read_json_object
from lora_analysis.storage.gguf import is_gguf, read_gguf
from lora_analysis.storage.limits import MAX_HEADER_BYTES, MAX_INDEX_BYTES
from lora_analysis.storage.safetensors import read_header

RECORD_FOLDER: Final = ".lora_analysis"
RECORD_VERSION: Final = 1
_CHUNK: Final = 1 << 20
# After a power loss, data that had not reached the disk are blocks of zeros.
_CHECKED_TAIL: Final = 64

# Kinds whose files are adapters or models, which readers must not read unfinished.
_READABLE_KINDS: Final = ("adapter", "run")

# writing: the first set of files is not complete; replacing: new files are taking the places of
# old ones; finished: all files are as recorded.
State = Literal["writing", "replacing", "finished"]

KEY: Final = "lora_analysis"
REFERENCE_FORMAT: Final = "lora_analysis reference"
"""The ``format`` that a JSON file with levels of unrelated adapters states, near its start."""
FIGURE_CREATOR: Final = "lora_analysis"
"""Creator that figures state; without a version, so that equal figures have equal bytes."""
# Figures have their metadata at the start of the file, PDFs at either end.
_HEAD: Final = 1 << 16
_FIGURES: Final = {
    ".svg": re.compile(rb"<dc:title>lora_analysis</dc:title>"),
    ".png": re.compile(rb"tEXtSoftware\0lora_analysis"),
    ".pdf": re.compile(rb"/Creator \(lora_analysis\)"),
}
GGUF_VERSION_KEY: Final = "lora_analysis.version"
_CONFIG_DIGEST: Final = "config_sha256"


@dataclass(frozen=True, slots=True)
class FileMark:
    """Size and SHA-256 of a file when it was finished."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """Files of one kind in a folder, and the run that wrote them.

    Parameters
    ----------
    kind
        Kind of the files: ``"adapter"``, ``"report"``, ``"run"``, … A folder may contain several
        kinds, each with its own record and files.
    verb
        The command or function that wrote them.
    run
        Its settings, as JSON values. Files of a run with other settings are not its result.
    state
        State of the files.
    files
        The finished files by name relative to the folder, with ``/`` between the parts.
    new
        While ``"replacing"``: the files of the new set.
    removed
        While ``"replacing"``: files of the earlier set that the new one does not have.
    names
        Until the run is finished: files that it creates directly in the folder, whether or not they
        remain.
    version
        Version of the package that wrote them.
    """

    kind: str
    verb: str
    run: Mapping[str, Any] = field(default_factory=dict)
    state: State = "writing"
    files: Mapping[str, FileMark] = field(default_factory=dict)
    new: Mapping[str, FileMark] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    version: str = __version__

    def as_finished(self) -> Record:
        """Return the record for the time after the new files have replaced the old ones."""
        return replace(self, state="finished", files=self.new, new={}, removed=(), names=())

    def write(self, folder: Path) -> None:
        """Write the record into its folder, atomically."""
        journal = {"new": _marks_document(self.new), "removed": list(self.removed)}
        document = {
            "record_version": RECORD_VERSION,
            "generator": f"lora_analysis {self.version}",
            "kind": self.kind,
            "verb": self.verb,
            "state": self.state,
            "run": dict(self.run),
            "files": _marks_document(self.files),
            **(journal if self.new else {}),
            **({"names": list(self.names)} if self.names else {}),
        }
        text = json.dumps(document, indent=1, allow_nan=False)
        write_atomic(record_path(folder, self.kind), text.encode())


def record_path(folder: Path, kind: str) -> Path:
    """Return the path of the record of one kind of output."""
    return folder / RECORD_FOLDER / f"{kind}.json"


def read_record(folder: Path, kind: str) -> Record | None:
    """Return the record of one kind in a folder; None if there is none that can be trusted.

    A record that cannot be read, or names files outside its folder, counts as none: the files are
    then treated as not ours.
    """
    path = record_path(folder, kind)
    if not path.is_file() or path.is_symlink():
        return None
    try:
        document = read_json_object(path, max_bytes=MAX_INDEX_BYTES)
        if (
            document["record_version"] != RECORD_VERSION
            or document["kind"] != kind
            or document["state"] not in ("writing", "replacing", "finished")
        ):
            return None
        return Record(
            kind=kind,
            verb=str(document["verb"]),
            run=dict(document["run"]),
            state=document["state"],
            files=_marks(document["files"]),
            new=_marks(document.get("new", {})),
            removed=tuple(_check_name(name) for name in document.get("removed", ())),
            names=tuple(_check_name(name) for name in document.get("names", ())),
            version=str(document["generator"]).rpartition(" ")[2],
        )
    except (InputError, KeyError, TypeError, ValueError):
        return None


def read_records(folder: Path) -> Iterator[Record]:
    """Yield the records of every kind in a folder."""
    inside = folder / RECORD_FOLDER
    if inside.is_symlink() or not inside.is_dir():
        return
    for path in sorted(inside.glob("*.json")):
        record = read_record(folder, path.stem)
        if record is not None:
            yield record


def refuse_unfinished(source: Path) -> None:
    """Raise if the files of a source are being written by this package, or were interrupted.

    Parameters
    ----------
    source
        A folder, or a file in it.

    Raises
    ------
    UnfinishedError
        The message names the verb and how to complete its work.
    """
    folder = source if source.is_dir() else source.parent
    for record in read_records(folder):
        if record.kind not in _READABLE_KINDS or record.state == "finished":
            continue
        if source.is_file() and source.name not in {*record.files, *record.new, *record.removed}:
            continue
        if record.state == "replacing":
            message = (
                f"{folder} is not complete: 'lora-analysis {record.verb}' was interrupted while it "
                "replaced files. Run the same command again to complete it."
            )
        else:
            message = (
                f"{folder} is not finished: 'lora-analysis {record.verb}' is still running there "
                "or was interrupted. Run the same command again to resume it."
            )
        raise UnfinishedError(message)


def mark_of(path: Path) -> FileMark:
    """Return the size and hash of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileMark(size, digest.hexdigest())


def file_state(path: Path, mark: FileMark) -> Literal["whole", "damaged", "edited"]:
    """Compare a file with its mark: whole, damaged, or edited.

    Damaged means that nobody can have done it on purpose: missing, empty, ending in zeros that were
    not there, or not readable as its suffix promises. Any other difference counts as edited.
    """
    if not path.is_file():
        return "damaged"
    if path.stat().st_size == mark.size and mark_of(path) == mark:
        return "whole"
    return "damaged" if _is_broken(path, mark) else "edited"


def _is_broken(path: Path, mark: FileMark) -> bool:
    """Return True for a file that is empty, ends in zeros, or does not parse by its suffix."""
    size = path.stat().st_size
    if size == 0:
        return mark.size > 0
    with path.open("rb") as stream:
        stream.seek(max(0, size - _CHECKED_TAIL))
        if not stream.read().strip(b"\0"):
            return True
        stream.seek(0)
        if path.suffix == ".jsonl":
            lines, _, rest = stream.read().rpartition(b"\n")
            return bool(rest) or not _is_json(lines.rpartition(b"\n")[2])
        if path.suffix == ".json":
            return not _is_json(stream.read(MAX_INDEX_BYTES))
        if path.suffix != ".safetensors":
            return False
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            return True
        raw = stream.read(length)
    try:
        header = parse_json_object(raw, path, what="the header", constants=False)
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name[:2] != "__"]
    except (InputError, KeyError, IndexError, TypeError, ValueError):
        return True
    return 8 + length + max(ends, default=0) != size


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _marks_document(marks: Mapping[str, FileMark]) -> dict[str, dict[str, Any]]:
    return {name: {"size": mark.size, "sha256": mark.sha256} for name, mark in marks.items()}


def _marks(document: Mapping[str, Any]) -> dict[str, FileMark]:
    return {
        _check_name(name): FileMark(int(mark["size"]), str(mark["sha256"]))
        for name, mark in document.items()
    }


def _check_name(name: object) -> str:
    """Return a name that stays inside its folder; raise ValueError for any other name."""
    text = str(name)
    parts = PurePosixPath(text).parts
    leads_out = not parts or PurePosixPath(text).is_absolute() or ".." in parts or "\0" in text
    if (
        leads_out
        or parts[0] == RECORD_FOLDER
        or (os.name != "posix" and ("\\" in text or ":" in text))
    ):
        message = f"{text!r} is not a name inside a folder"
        raise ValueError(message)
    return text


def safetensors_mark(config: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the metadata entry that marks a safetensors file as ours.

    Parameters
    ----------
    config
        The configuration that is written with the weights: the entry states its digest.
    """
    mark = {"version": __version__}
    if config is not None:
        mark[_CONFIG_DIGEST] = _config_digest(config)
    return {KEY: json.dumps(mark, separators=(",", ":"), sort_keys=True)}


def _config_digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a configuration's content, independent of layout and order of keys."""
    text = json.dumps(config, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def config_findings(
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    weights: Path,
    config_path: Path | None,
) -> list[Finding]:
    """Return a finding if weights state that they were written with another configuration.

    Parameters
    ----------
    metadata, weights
        Metadata and path of the weights.
    config, config_path
        The whole document next to them, and its path; None if there is none.
    """
    try:
        mark = json.loads(metadata.get(KEY, ""))
    except (ValueError, RecursionError):
        return []
    digest = mark.get(_CONFIG_DIGEST) if isinstance(mark, dict) else None
    if not isinstance(digest, str) or config_path is None or digest == _config_digest(config):
        return []
    fields = {"weights": weights.name, "config": config_path.name}
    return [Finding("config-not-written-with-weights", fields)]


def is_marked(path: Path) -> bool:
    """Return True if a file carries our mark; False if it cannot be read."""
    try:
        if path.suffix in _FIGURES:
            with path.open("rb") as stream:
                content = stream.read(_HEAD)
                stream.seek(max(0, path.stat().st_size - _HEAD))
                content += stream.read()
            return _FIGURES[path.suffix].search(content) is not None
        if path.suffix == ".json":
            with path.open("rb") as stream:
                return f'"format": "{REFERENCE_FORMAT}"'.encode() in stream.read(_HEAD)
        if is_gguf(path):
            return GGUF_VERSION_KEY in read_gguf(path).metadata
        return KEY in read_header(path).metadata
    except (InputError, OSError):
        return False
