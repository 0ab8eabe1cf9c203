"""Task, rank, seed and step of adapters, from a pattern that their names match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from lora_analysis.adapter import Adapter
from lora_analysis.errors import InputError
from lora_analysis.finding import Finding
from lora_analysis.formats.sources import CONTAINER_SUFFIXES, is_uninformative
from lora_analysis.text import whole_characters

FIELDS = ("task", "rank", "seed", "step")
# The value of ``label`` for which names are not looked at.
NO_PATTERN = "none"
# Patterns that are tried if no pattern is given.
COMMON_PATTERNS = (
    "{task}-r{rank}-s{seed}",
    "{task}_r{rank}_s{seed}",
    "{task}-r{rank}-seed{seed}",
    "{task}_r{rank}_seed{seed}",
    "{task}-rank{rank}-seed{seed}",
    "{task}_rank{rank}_seed{seed}",
    "{task}-s{seed}",
    "{task}_s{seed}",
    "{task}-seed{seed}",
    "{task}_seed{seed}",
    "{task}-seed-{seed}",
    "{task}_seed_{seed}",
)
# The end of a task that is the rank of a name with parts in an order of its own.
_RANK_IN_TASK = re.compile(r"(^|[-_/])r(ank)?[-_]?\d+$", re.IGNORECASE)
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
    match = re.compile("".join(parts)).fullmatch(text)
    if match is None:
        return None
    return {
        field: value if field == "task" else int(value)
        for field, value in match.groupdict().items()
    }


def _path(adapter: Adapter) -> PurePath | None:
    """Return the location of an adapter without a file suffix; None in memory."""
    if adapter.provenance.location is None:
        return None
    path = PurePath(whole_characters(adapter.provenance.location))
    return path.with_suffix("") if path.suffix in CONTAINER_SUFFIXES else path


def with_label_facts(adapters: Sequence[Adapter], pattern: str | None) -> list[Adapter]:
    """Return the adapters with task, seed and step from their names, and rank if unknown.

    Task, seed and step from the user's pattern override the files. A rank that contradicts the
    tensors does not: the adapter gets a finding, as it does if no name matches the pattern.

    Without a pattern, a common one fills in unknown tasks and seeds (see `common_pattern`); the
    pattern ``"none"`` prevents that.
    """
    if pattern is None:
        common = common_pattern(adapters)
        if common is None:
            return list(adapters)
        note = Finding("labels-from-names", {"pattern": common})
        labeled = []
        for adapter in adapters:
            source = adapter.provenance
            if None in (source.task, source.seed):
                facts = _facts_of(_own_names(adapter), common) or {}
                missing: dict[str, Any] = {
                    field: value for field, value in facts.items() if getattr(source, field) is None
                }
                findings = (*source.findings, note)
                labeled.append(adapter.with_provenance(**missing, findings=findings))
            else:
                labeled.append(adapter)
        return labeled
    if pattern.lower() == NO_PATTERN:
        return list(adapters)
    return [_with_facts(adapter, pattern) for adapter in adapters]


def _with_facts(adapter: Adapter, pattern: str) -> Adapter:
    """Return an adapter with the facts that its label, or one of two ends of its path, states."""
    source, path = adapter.provenance, _path(adapter)
    names = [adapter.label]
    if path is not None:
        # As many segments as the pattern has, with the last one and without: many adapters are in
        # a folder with a generic name (``final``).
        depth, parts = pattern.count("/") + 1, path.parts
        ends = ("/".join(parts[max(0, i - depth) : i]) for i in (len(parts), len(parts) - 1))
        names += filter(None, ends)
    facts: dict[str, Any] | None = _facts_of(names, pattern)
    if facts is None:
        misfit = Finding("label-misfit", {"pattern": repr(pattern)})
        return adapter.with_provenance(findings=(*source.findings, misfit))
    rank = facts.get("rank")
    if source.rank is not None and rank is not None and rank != source.rank:
        note = f"its name says rank {rank}, its tensors have rank {source.rank}, which is used."
        facts["findings"] = (*source.findings, note)
    if source.rank is not None:
        facts.pop("rank", None)
    return adapter.with_provenance(**facts)


def _facts_of(names: Sequence[str], pattern: str) -> dict[str, str | int] | None:
    return next(filter(None, (label_facts(pattern, name) for name in names)), None)


def _own_names(adapter: Adapter) -> tuple[str, ...]:
    """Return names that are the adapter's alone: a folder is, if what it holds has a generic name.

    Of an adapter in a file with several, only its name in there.
    """
    _, inside, name = adapter.label.rpartition("#")
    if inside:
        return (name,)
    path = _path(adapter)
    names = []
    for parts in (PurePath(name).parts, path.parts if path else ()):
        names += [part for part in reversed(parts) if not is_uninformative(part)][:1]
    return tuple(names)


def common_pattern(adapters: Sequence[Adapter]) -> str | None:
    """Return the pattern that names task and seed of every adapter without them; else None.

    One of `COMMON_PATTERNS` must match a name of each of these adapters, and contradict nothing:
    ranks in names are those of the tensors, tasks and seeds that a file states are those in its
    name. A single adapter is not enough: its name may match by accident.
    """
    unlabeled = [a for a in adapters if None in (a.provenance.task, a.provenance.seed)]
    if len(adapters) < 2 or not unlabeled:
        return None
    for pattern in COMMON_PATTERNS:
        facts = [_facts_of(_own_names(adapter), pattern) for adapter in unlabeled]
        if all(facts):
            pairs = zip(unlabeled, facts, strict=True)
            agree = all(_agrees(adapter, values or {}) for adapter, values in pairs)
            return pattern if agree else None
    return None


def _agrees(adapter: Adapter, facts: dict[str, str | int]) -> bool:
    """Return True if facts from a name contradict neither the file nor the tensors."""
    source = adapter.provenance
    if "/" in str(facts["task"]) or _RANK_IN_TASK.search(str(facts["task"])):
        return False
    for field, value in (("task", source.task), ("seed", source.seed)):
        if value not in (None, facts[field]):
            return False
    rank = facts.get("rank")
    if rank is None or source.rank is not None:
        return rank in (None, source.rank)
    return any(adapter.outline(name).rank == rank for name in adapter)
