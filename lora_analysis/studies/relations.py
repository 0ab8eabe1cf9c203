"""How adapters are related: by base, task, rank, seed and step, where those are known."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from enum import StrEnum

from lora_analysis.adapter import Adapter


class Relation(StrEnum):
    """How two adapters are related by base, task, rank, seed and step."""

    OTHER_RANK = "same task, different rank"
    OTHER_SEED = "same task, different seed"
    OTHER_RANK_AND_SEED = "same task, different rank and seed"
    REPEATED = "same task, rank and seed"
    REFERENCE = "different task, different seed"  # unrelated, except for the base model
    SHARED_SEED = "different task, same seed"
    SHARED_SEED_OTHER_RANK = "different task, different rank, same seed"
    SAME_RUN = "same run, different step"
    EARLIER = "earlier step"  # not the last of its run: not used where the last one is
    OTHER_BASE = "different base"
    UNKNOWN = "unknown"


_ON_A_DISK = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|file:")


def unique_labels(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with labels made unique by a number where two are the same."""
    seen: dict[str, int] = {}
    result = []
    for adapter in adapters:
        seen[adapter.label] = count = seen.get(adapter.label, 0) + 1
        result.append(adapter if count == 1 else adapter.with_label(f"{adapter.label} ({count})"))
    return result


def base_key(name: str | None) -> str | None:
    """Return what tells base models apart: the last part of a path or of a hub's name.

    ``meta-llama/Llama-3.1-8B`` and ``/models/Llama-3.1-8B/`` are one base.
    """
    if not name:
        return None
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower() or None


def shown_base(name: str | None) -> str | None:
    """Return the name of a base without the folders of somebody's disk; a hub's name as it is."""
    if name is None or not _ON_A_DISK.match(name):
        return name
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] or None


def run_key(adapter: Adapter) -> Hashable | None:
    """Return what the checkpoints of one run have in common; None where nothing says so.

    Task, rank and seed where task and seed are known, else the folder in which the checkpoints
    lie side by side.
    """
    source = adapter.provenance
    if source.step is None:
        return None
    if source.task is not None and source.seed is not None:
        return (base_key(source.base_model), source.task, source.rank, source.seed)
    return None if source.path is None else str(source.path.absolute().parent)


def earlier_checkpoints(adapters: Sequence[Adapter]) -> set[str]:
    """Return the labels of checkpoints that are not the last of their run."""
    last: dict[Hashable, Adapter] = {}
    for adapter in adapters:
        key = run_key(adapter)
        if key is not None and (key not in last or _step(adapter) >= _step(last[key])):
            last[key] = adapter
    kept = {adapter.label for adapter in last.values()}
    return {a.label for a in adapters if run_key(a) is not None and a.label not in kept}


def _step(adapter: Adapter) -> int:
    return adapter.provenance.step or 0


def relation(a: Adapter, b: Adapter) -> Relation:
    """Return how two adapters are related, from task, rank and seed; "unknown" without them."""
    one, two = a.provenance, b.provenance
    if _differ(base_key(one.base_model), base_key(two.base_model)):
        return Relation.OTHER_BASE
    if one.step != two.step and run_key(a) is not None and run_key(a) == run_key(b):
        return Relation.SAME_RUN
    if None in (one.task, two.task, one.seed, two.seed):
        return Relation.UNKNOWN
    if one.task == two.task and None in (one.rank, two.rank):
        return Relation.UNKNOWN
    if one.task != two.task:
        if one.seed != two.seed:
            return Relation.REFERENCE
        return Relation.SHARED_SEED if one.rank == two.rank else Relation.SHARED_SEED_OTHER_RANK
    if one.seed == two.seed:
        return Relation.REPEATED if one.rank == two.rank else Relation.OTHER_RANK
    return Relation.OTHER_SEED if one.rank == two.rank else Relation.OTHER_RANK_AND_SEED


def _differ(a: str | None, b: str | None) -> bool:
    """Return whether both are known, and other ones."""
    return None not in (a, b) and a != b
