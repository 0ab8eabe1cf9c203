"""Task, rank, seed and step of adapters, from a pattern that their names match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from lora_analysis.adapter import Adapter
from lora_analysis.errors import InputError
from lora_analysis.finding import Finding
from lora_analysis.formats.sources import CONTAINER_SUFFIXES
from lora_analysis.text import whole_characters

FIELDS = ("task", "rank", "seed", "step")
_PART = re.compile(r"\{(?P<field>[^{}]*)\}|(?P<any>\*)|(?P<text>[^{}*]+)|(?P<stray>[{}])")


def label_facts(pattern: str, text: str) -> dict[str, str | int] | None:
    """Return the fields that a pattern extracts from a name; None if it does not match.

    ``{task}`` matches any text, ``{rank}``, ``{seed}`` and ``{step}`` match digits, ``*`` matches
    anything and is dropped; the pattern must match the whole text.

    Raises
    ------
    InputError
        The pattern has an unknown or repeated field, none at all, or a stray brace.

    Examples
    --------
    >>> label_facts("{task}-r{rank}-s{seed}", "rotate-r8-s0")
    {'task': 'rotate', 'rank': 8, 'seed': 0}
    """
    match = _expression(pattern).fullmatch(text)
    if match is None:
        return None
    return {
        field: value if field == "task" else int(value)
        for field, value in match.groupdict().items()
    }


def _expression(pattern: str) -> re.Pattern[str]:
    parts, seen = [], []
    for part in _PART.finditer(pattern):
        if part["text"]:
            parts.append(re.escape(part["text"]))
        elif part["any"]:
            parts.append(".*?")
        elif part["field"] in FIELDS and part["field"] not in seen:
            seen.append(part["field"])
            kind = ".+?" if part["field"] == "task" else r"\d{1,12}"
            parts.append(f"(?P<{part['field']}>{kind})")
        else:
            parts, seen = [], []
            break
    if not seen:
        fields = ", ".join(f"{{{name}}}" for name in FIELDS)
        message = (
            f"The pattern of labels {pattern!r} must name at least one of {fields}, each at most "
            "once, and no other field: '{task}-r{rank}-s{seed}'."
        )
        raise InputError(message)
    return re.compile("".join(parts))


def candidate_names(adapter: Adapter, depth: int) -> tuple[str, ...]:
    """Return the names that a pattern is matched with: the label, then two ends of the path.

    The last ``depth`` segments of the path without a file suffix, and those before the last
    segment: many adapters are in a folder with a generic name (``final``).
    """
    location = adapter.provenance.location
    if location is None:
        return (adapter.label,)
    path = PurePath(whole_characters(location))
    if path.suffix in CONTAINER_SUFFIXES:
        path = path.with_suffix("")
    parts = path.parts
    ends = ["/".join(parts[max(0, end - depth) : end]) for end in (len(parts), len(parts) - 1)]
    return (adapter.label, *filter(None, ends))


def with_label_facts(adapters: Sequence[Adapter], pattern: str | None) -> list[Adapter]:
    """Return the adapters with task, seed and step from their names, and rank if unknown.

    Task, seed and step from the user's pattern override the files. A rank that contradicts the
    tensors does not: the adapter gets a finding, as it does if no name matches the pattern.
    """
    if pattern is None:
        return list(adapters)
    return [_with_facts(adapter, pattern) for adapter in adapters]


def _with_facts(adapter: Adapter, pattern: str) -> Adapter:
    source = adapter.provenance
    for name in candidate_names(adapter, pattern.count("/") + 1):
        facts: dict[str, Any] | None = label_facts(pattern, name)
        if facts is not None:
            break
    else:
        misfit = Finding("label-misfit", {"pattern": repr(pattern)})
        return adapter.with_provenance(findings=(*source.findings, misfit))
    rank = facts.get("rank")
    if source.rank is not None and rank is not None and rank != source.rank:
        note = f"its name says rank {rank}, its tensors have rank {source.rank}, which is used."
        facts["findings"] = (*source.findings, note)
    if source.rank is not None:
        facts.pop("rank", None)
    return adapter.with_provenance(**facts)
