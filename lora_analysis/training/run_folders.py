"""Compare the folder of a run with a configuration: finished, unfinished, changed, damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.outputs import is_bookkeeping
from lora_analysis.storage.records import Record, file_state, read_record
from lora_analysis.training.files import MANIFEST_NAME, file_sha256
from lora_analysis.training.inputs import run_key

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.training.config import RunConfig

KIND = "run"
METRICS_NAME = "metrics.jsonl"
FAILURE_NAME = "failed.json"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")
TRAJECTORY_NAME = "trajectory"
CHECKPOINT_NAME = "checkpoint.safetensors"
# The checkpoint before the last, and one on its way to become the last.
EARLIER_CHECKPOINT_NAME = "checkpoint.earlier.safetensors"
NEXT_CHECKPOINT_NAME = "checkpoint.next.safetensors"
# Most differences of a configuration that a message lists.
_LISTED = 6

RunState = Literal["missing", "unfinished", "changed", "damaged", "edited", "occupied", "finished"]


def run_state(config: RunConfig, folder: Path) -> RunState:
    """Return what the folder of a run holds.

    Parameters
    ----------
    config
        The requested run.
    folder
        The run's own folder.

    Returns
    -------
    RunState
        ``"finished"``: this run, its files as they were written. ``"missing"``: nothing.
        ``"unfinished"``: this run, interrupted. ``"changed"``: a run of another configuration,
        base, data or version. ``"damaged"``: a file is absent or cannot be what was written.
        ``"edited"``: somebody changed a file. ``"occupied"``: files that no run wrote.
    """
    record = read_record(folder, KIND)
    if record is None:
        return _unrecorded_state(config, folder)
    if record.run.get("key") != run_key(config):
        return "changed"
    if record.state != "finished":
        return "unfinished"
    states = {file_state(folder / name, mark) for name, mark in record.files.items()}
    if "edited" in states:
        return "edited"
    return "damaged" if "damaged" in states else "finished"


def _unrecorded_state(config: RunConfig, folder: Path) -> RunState:
    """Return the state of a folder without a record: empty, somebody's, or an earlier version's."""
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        names = (
            [path for path in folder.iterdir() if not is_bookkeeping(path)]
            if folder.is_dir()
            else []
        )
        return "occupied" if any(path.name != FAILURE_NAME for path in names) else "missing"
    try:
        facts = read_json_object(manifest)
    except InputError:
        return "occupied"
    files = facts.get("files")
    if "key" not in facts or not isinstance(files, dict) or METRICS_NAME not in files:
        return "occupied"
    if facts["key"] != run_key(config):
        return "changed"
    whole = {name: _sha256_or_none(folder / name) for name in files} == files
    return "finished" if whole else "occupied"


def changes(config: RunConfig, folder: Path) -> str:
    """Return how the run in a folder differs from the requested one, for a message."""
    record = read_record(folder, KIND)
    facts: Mapping[str, Any] = record.run if record is not None else _manifest(folder)
    version = record.version if record is not None else _version(facts)
    earlier = dict(_flat(facts.get("config", {})))
    requested = dict(_flat(config.to_dict()))
    differences = [
        f"{name} {_shown(earlier[name])}, now {_shown(requested[name])}"
        for name in sorted(earlier.keys() & requested.keys())
        if earlier[name] != requested[name]
    ]
    if earlier.keys() != requested.keys():  # fields were renamed, added or removed
        differences.append("another version's configuration format")
    if not differences:
        differences = ["the content of its base or data, or how this version trains"]
    more = len(differences) - _LISTED
    text = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
    return f"{text} (written by lora_analysis {version})"


def unfinished_names(config: RunConfig) -> list[str]:
    """Return the files that a run makes in its folder before it is finished."""
    names = [METRICS_NAME, CHECKPOINT_NAME, EARLIER_CHECKPOINT_NAME, NEXT_CHECKPOINT_NAME]
    for step in config.loop.trajectory:
        place = f"{TRAJECTORY_NAME}/{config.name}-step{step}"
        names += [f"{place}/{name}" for name in (*ADAPTER_NAMES, MANIFEST_NAME)]
    return names


def is_in_place(record: Record | None) -> bool:
    """Return True if a run works in its folder itself, as no finished files lie there."""
    return record is not None and record.state == "writing" and bool(record.names)


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(folder / MANIFEST_NAME)
    except InputError:
        return {}


def _version(facts: Mapping[str, Any]) -> str:
    versions = facts.get("versions")
    return str(versions.get("lora-analysis")) if isinstance(versions, dict) else "unknown"


def _flat(fields: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(fields, Mapping):
        yield prefix.rstrip("."), fields
        return
    for name, value in fields.items():
        yield from _flat(value, f"{prefix}{name}.")


def _shown(value: object) -> str:
    return "not set" if value is None else repr(value)


def _sha256_or_none(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
