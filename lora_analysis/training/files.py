"""Files of bases and runs: their names, their hashes, and JSON that is written whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.paths import bundled_data

MODEL_TYPE = "digits-vit"  # of the base: in its config.json, and the name of its folder
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MANIFEST_NAME = "manifest.json"


def base_folder() -> Path:
    """Return the folder of the base model that is shipped with the package."""
    return bundled_data(MODEL_TYPE)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, fields: dict[str, Any]) -> Path:
    """Write fields as one indented JSON document, whole or not at all."""
    return write_atomic(path, (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode())
