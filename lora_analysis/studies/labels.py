"""What adapters are: task, rank, seed and step, from their files or from a pattern of names."""

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
    """Return what a name says under a pattern; None where it does not fit.

    ``{task}`` stands for any text, ``{rank}``, ``{seed}`` and ``{step}`` for digits, ``*`` for
    anything that is not kept; the pattern must fit the whole text.

    Raises
    ------
    InputError
        The pattern has an unknown or repeated field, none at all, or a stray brace.

    Examples
    --------
    >>> label_facts("{task}-r{rank}-s{seed}", "rotate-r8-s0")
    {'task': 'rotate', 'rank': 8, 'seed': 0}
    """
    found = _expression(pattern).fullmatch(text)
    if found is None:
        return None
    return {
        field: value if field == "task" else int(value)
        for field, value in found.groupdict().items()
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
        message = (
            f"The pattern of labels {pattern!r} must name at least one of "
            f"{', '.join(f'{{{one}}}' for one in FIELDS)}, each at most once, and no other field: "
            "'{task}-r{rank}-s{seed}'."
        )
        raise InputError(message)
    return re.compile("".join(parts))


def names_of(adapter: Adapter, depth: int) -> tuple[str, ...]:
    """Return the names a pattern is held against: the label, then the end of the path.

    The path's last ``depth`` segments, without the suffix of a file, once as they are and once
    without the last: adapters often lie in a folder that says nothing (``final``).
    """
    place = adapter.provenance.location
    if place is None:
        return (adapter.label,)
    path = PurePath(whole_characters(place))
    if path.suffix in CONTAINER_SUFFIXES:
        path = path.with_suffix("")
    parts = path.parts
    ends = ["/".join(parts[max(0, end - depth) : end]) for end in (len(parts), len(parts) - 1)]
    return (adapter.label, *(one for one in ends if one))


def with_label_facts(adapters: Sequence[Adapter], pattern: str | None) -> list[Adapter]:
    """Return the adapters with task, seed and step as their names say, and rank where unknown.

    What the user's pattern says of task, seed and step wins over the files. A rank that the
    tensors contradict does not: that is noted with the adapter, as are names that do not fit.
    """
    if pattern is None:
        return list(adapters)
    return [_described(adapter, pattern) for adapter in adapters]


def _described(adapter: Adapter, pattern: str) -> Adapter:
    known = adapter.provenance
    for name in names_of(adapter, pattern.count("/") + 1):
        facts: dict[str, Any] | None = label_facts(pattern, name)
        if facts is not None:
            break
    else:
        misfit = Finding("label-misfit", {"pattern": repr(pattern)})
        return adapter.with_provenance(findings=(*known.findings, misfit))
    rank = facts.get("rank")
    if known.rank is not None and rank is not None and rank != known.rank:
        note = f"its name says rank {rank}, its tensors have rank {known.rank}, which counts."
        facts["findings"] = (*known.findings, note)
    if known.rank is not None:
        facts.pop("rank", None)
    return adapter.with_provenance(**facts)
