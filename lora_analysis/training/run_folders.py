"""The folder of a run: its file names, its manifest, and its state (finished, changed, …)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.outputs import is_bookkeeping
from lora_analysis.storage.records import Record, file_state, read_record
from lora_analysis.training.inputs import MANIFEST_NAME, file_sha256, run_hash

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.training.config import RunConfig

KIND = "run"
METRICS_NAME = "metrics.jsonl"
FAILURE_NAME = "failed.json"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")
TRAJECTORY_NAME = "trajectory"
CHECKPOINT_NAME = "checkpoint.safetensors"
# The checkpoint before the last, and one that is being written.
EARLIER_CHECKPOINT_NAME = "checkpoint.earlier.safetensors"
NEXT_CHECKPOINT_NAME = "checkpoint.next.safetensors"
_MAX_DIFFERENCES = 6  # in a message

RunState = Literal["missing", "unfinished", "changed", "damaged", "edited", "occupied", "finished"]


def run_state(config: RunConfig, folder: Path) -> RunState:
    """Return the state of a run's folder.

    Parameters
    ----------
    config
        Configuration of the run.
    folder
        Folder of the run.

    Returns
    -------
    RunState
        ``"finished"``: this run, with its files unchanged. ``"missing"``: no files.
        ``"unfinished"``: this run, interrupted. ``"changed"``: a run with another configuration,
        base, data or version. ``"damaged"``: a file is missing or truncated. ``"edited"``: a file
        was changed by a user. ``"occupied"``: files that no run wrote.
    """
    record = read_record(folder, KIND)
    if record is not None:
        if record.run.get("key") != run_hash(config):
            return "changed"
        if record.state != "finished":
            return "unfinished"
        states = {file_state(folder / name, mark) for name, mark in record.files.items()}
        if "edited" in states:
            return "edited"
        return "damaged" if "damaged" in states else "finished"
    # A folder without a record is empty, a user's, or of an earlier version.
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        paths = folder.iterdir() if folder.is_dir() else ()
        is_foreign = any(p.name != FAILURE_NAME and not is_bookkeeping(p) for p in paths)
        return "occupied" if is_foreign else "missing"
    try:
        facts = read_json_object(manifest)
    except InputError:
        return "occupied"
    files = facts.get("files")
    if "key" not in facts or not isinstance(files, dict) or METRICS_NAME not in files:
        return "occupied"
    if facts["key"] != run_hash(config):
        return "changed"
    is_intact = all(
        (folder / name).is_file() and file_sha256(folder / name) == sha256
        for name, sha256 in files.items()
    )
    return "finished" if is_intact else "occupied"


def describe_changes(config: RunConfig, folder: Path) -> str:
    """Return how the run in a folder differs from a configuration, for a message."""
    record = read_record(folder, KIND)
    if record is not None:
        facts, written_by = record.run, record.version
    else:
        try:
            facts = read_json_object(folder / MANIFEST_NAME)
        except InputError:
            facts = {}
        versions = facts.get("versions")
        written_by = "unknown"
        if isinstance(versions, dict):
            written_by = str(versions.get("lora-analysis"))
    earlier = dict(_flatten(facts.get("config", {})))
    requested = dict(_flatten(config.to_dict()))
    differences = []
    for name in sorted(earlier.keys() & requested.keys()):
        values = earlier[name], requested[name]
        if values[0] != values[1]:
            before, now = ("not set" if value is None else repr(value) for value in values)
            differences.append(f"{name} {before}, now {now}")
    if earlier.keys() != requested.keys():  # fields were renamed, added or removed
        differences.append("another version's configuration format")
    if not differences:
        differences = ["the content of its base or data, or how this version trains"]
    more = len(differences) - _MAX_DIFFERENCES
    text = "; ".join(differences[:_MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    return f"{text} (written by lora_analysis {written_by})"


def unfinished_names(config: RunConfig) -> list[str]:
    """Return the files that a run writes into its folder before it is finished."""
    names = [METRICS_NAME, CHECKPOINT_NAME, EARLIER_CHECKPOINT_NAME, NEXT_CHECKPOINT_NAME]
    for step in config.loop.trajectory:
        folder = f"{TRAJECTORY_NAME}/{config.name}-step{step}"
        names += [f"{folder}/{name}" for name in (*ADAPTER_NAMES, MANIFEST_NAME)]
    return names


def is_in_place(record: Record | None) -> bool:
    """Return True if a run works in its own folder, which has no finished files."""
    return record is not None and record.state == "writing" and bool(record.names)


def describe_run(config: RunConfig, inputs: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the fields of a manifest that identify a run."""
    return {
        "name": config.name,
        "task": config.task,
        "rank": config.rank if config.method == "lora" else None,
        "seed": config.seed,
        "data_seed": config.seeds.data,
        "dropout_seed": config.seeds.dropout,
        "config": config.to_dict(),
        "inputs": dict(inputs),
        "key": key,
    }


def summarize_metrics(path: Path, epoch: int) -> dict[str, float]:
    """Return the final metrics of a run from the lines of its metrics file.

    ``loss`` is the mean training loss of the last ``epoch`` steps; those of the test split are
    given before training (``base_…``) and at the end.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line][-epoch:]
    metrics: dict[str, float] = {}
    for name in ("accuracy", "correlation", "loss"):
        values = [line[f"test_{name}"] for line in lines if f"test_{name}" in line]
        role = "test_loss" if name == "loss" else name
        if values:
            metrics |= {f"base_{role}": values[0], role: values[-1]}
    return metrics | {"loss": sum(losses) / len(losses)}


def _flatten(fields: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(fields, Mapping):
        yield prefix.rstrip("."), fields
        return
    for name, value in fields.items():
        yield from _flatten(value, f"{prefix}{name}.")
