"""Settings of a training run in a YAML file, by key alone, wherever in the tree they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_analysis.storage.limits import MAX_CONFIG_BYTES

if TYPE_CHECKING:
    from pathlib import Path


def trainer_settings(path: Path) -> dict[str, Any]:
    """Return the plain values of a YAML file by key, empty if it cannot be read.

    A key that has two different values in the file is left out: its path in the tree, which
    differs between versions of a trainer, would decide between them.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Takes the tags of Python objects, which some trainers write, for null."""

    Loader.add_multi_constructor("", lambda _loader, _suffix, _node: None)
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        pending = [yaml.load(path.read_bytes(), Loader)]
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    values: dict[str, Any] = {}
    ambiguous = set()
    seen = set()  # an anchor may be used any number of times
    while pending:
        node = pending.pop()
        if not isinstance(node, dict | list) or id(node) in seen:
            continue
        seen.add(id(node))
        pending += node.values() if isinstance(node, dict) else node
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, str | int | float):
                first = values.setdefault(str(key), value)
                if first != value or type(first) is not type(value):
                    ambiguous.add(str(key))
    return {key: value for key, value in values.items() if key not in ambiguous}


def number(value: object) -> float | None:
    """Return a setting as a finite number, None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def count(value: object) -> int | None:
    """Return a setting as a positive whole number, None if it is not one."""
    value = int(value) if isinstance(value, str) and value.isdecimal() else value
    return value if type(value) is int and 0 < value < 10**9 else None
