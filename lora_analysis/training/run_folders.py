"""What the folder of a run holds, and whether that is the run that is wanted, whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.training.files import MANIFEST_NAME, file_sha256
from lora_analysis.training.inputs import run_key

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.training.config import RunConfig

METRICS_NAME = "metrics.jsonl"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")
TRAJECTORY_NAME = "trajectory"
CHECKPOINT_NAME = "checkpoint.safetensors"
# All that a run may have left in its folder, the manifest first: without it nothing is finished.
OWN_FILES = (
    MANIFEST_NAME,
    *ADAPTER_NAMES,
    "config.json",
    "model.safetensors",
    METRICS_NAME,
    CHECKPOINT_NAME,
)

RunState = Literal["missing", "unfinished", "changed", "damaged", "finished"]


def run_state(config: RunConfig, folder: Path) -> RunState:
    """Return what the folder of a run holds.

    Parameters
    ----------
    config
        The run that is wanted.
    folder
        The run's own folder.

    Returns
    -------
    RunState
        ``"finished"``: this very run, its files as they were written. ``"missing"``: nothing.
        ``"unfinished"``: no manifest, which is written last. ``"changed"``: another configuration
        or base. ``"damaged"``: a file is absent or not the one that was written, or the manifest
        cannot be read.
    """
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return "unfinished" if folder.is_dir() and any(folder.iterdir()) else "missing"
    try:
        found = read_json_object(manifest)
    except InputError:
        return "damaged"
    if found.get("key") != run_key(config):
        return "changed"
    stated = found.get("files")
    if not isinstance(stated, dict) or METRICS_NAME not in stated:
        return "damaged"
    whole = {name: _sha256_or_none(folder / name) for name in stated} == stated
    return "finished" if whole else "damaged"


def _sha256_or_none(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
