"""Marks that identify files of ours, and the digest that ties weights to their configuration.

Every file of tensors that this package writes states its version in the metadata, which other
programs ignore: safetensors under `KEY` as JSON, GGUF as the value ``lora_analysis.version``.
Figures (SVG, PNG, PDF) name the package as their creator.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Final

from lora_analysis import __version__
from lora_analysis.errors import InputError
from lora_analysis.finding import Finding
from lora_analysis.storage.gguf import is_gguf, read_gguf
from lora_analysis.storage.safetensors import read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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


def safetensors_mark(config: Mapping[str, Any] | None = None) -> dict[str, str]:
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
