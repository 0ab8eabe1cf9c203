"""The mark by which a single file is known as written by this package, in its own metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

GENERATOR: Final = "lora_analysis"
"""What figures carry as their creator: no version, so that figures stay the same bytes."""

MARK_KEY: Final = "lora_analysis"
"""Key in the metadata of a safetensors file; ``lora_analysis.version`` in GGUF."""

# The metadata of these formats stands at the start of the file, that of PDF at either end.
_HEAD: Final = 1 << 16
_FIGURES: Final = {
    ".svg": re.compile(rb"<dc:title>lora_analysis</dc:title>"),
    ".png": re.compile(rb"tEXtSoftware\0lora_analysis"),
    ".pdf": re.compile(rb"/Creator \(lora_analysis\)"),
}
_GGUF_KEY: Final = b"lora_analysis.version"


def is_marked(path: Path) -> bool:
    """Return True if a file says in its own metadata that this package wrote it."""
    try:
        if path.suffix == ".safetensors":
            return _is_marked_safetensors(path)
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
            if path.suffix == ".gguf":
                return head[:4] == b"GGUF" and _GGUF_KEY in head
            pattern = _FIGURES.get(path.suffix)
            if pattern is None:
                return False
            if path.suffix == ".pdf":
                stream.seek(max(0, path.stat().st_size - _HEAD))
                head += stream.read()
            return pattern.search(head) is not None
    except OSError:
        return False


def _is_marked_safetensors(path: Path) -> bool:
    from lora_analysis.errors import InputError
    from lora_analysis.storage.headers import read_header

    try:
        return MARK_KEY in read_header(path).metadata
    except InputError:
        return False
