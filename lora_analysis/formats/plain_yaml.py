"""Single values of a trainer's YAML file, found line by line: enough for ``lora_alpha: 16``.

No YAML library is needed, and nothing of YAML but plain ``key: value`` lines is understood. A key
that stands in the file with two different values gives none: which one is meant, its place in the
tree would say.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.storage.limits import MAX_CONFIG_BYTES

if TYPE_CHECKING:
    from pathlib import Path

_LINE: Final = re.compile(r"\s*([\w.]+):\s+['\"]?([^'\"#\n]+?)['\"]?\s*(#.*)?")


def plain_values(path: Path) -> dict[str, str]:
    """Return the keys of a file that have one plain value, empty where there is no such file."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    values: dict[str, str] = {}
    doubtful = set()
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            key, value = match[1], match[2]
            if values.setdefault(key, value) != value:
                doubtful.add(key)
    return {key: value for key, value in values.items() if key not in doubtful}


def number(text: str | None) -> float | None:
    """Return the finite number that a value spells, or None."""
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < float("inf") else None


def count(text: str | None) -> int | None:
    """Return the whole positive number that a value spells, or None."""
    plain = text is not None and text.isdecimal() and len(text) < 10
    return int(text) or None if plain and text is not None else None
