"""How adapters are related: by task, rank and seed, where those are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lora_analysis.adapter import Adapter

Relation = Literal[
    "same task, other rank",
    "same task, other seed",
    "same task, other rank and seed",
    "same task, rank and seed",
    "other task, other seed",
    "other task, same seed",
    "other task, other rank, same seed",
    "unknown",
]
REFERENCE: Relation = "other task, other seed"
SHARED_SEED: Relation = "other task, same seed"


def unique_labels(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with labels made unique by a number where two are the same."""
    seen: dict[str, int] = {}
    result = []
    for adapter in adapters:
        seen[adapter.label] = count = seen.get(adapter.label, 0) + 1
        result.append(adapter if count == 1 else adapter.relabelled(f"{adapter.label} ({count})"))
    return result


def relation(a: Adapter, b: Adapter) -> Relation:
    """Return how two adapters are related, from task, rank and seed; "unknown" without them."""
    one, two = a.provenance, b.provenance
    bases = (one.base_model, two.base_model)
    if None in (one.task, two.task, one.seed, two.seed) or _differ(*bases):
        return "unknown"
    if one.task == two.task and None in (one.rank, two.rank):
        return "unknown"
    if one.task != two.task:
        if one.seed != two.seed:
            return REFERENCE
        return SHARED_SEED if one.rank == two.rank else "other task, other rank, same seed"
    if one.seed == two.seed:
        return "same task, rank and seed" if one.rank == two.rank else "same task, other rank"
    return "same task, other seed" if one.rank == two.rank else "same task, other rank and seed"


def _differ(a: str | None, b: str | None) -> bool:
    """Return whether both base models are known, and other ones."""
    return None not in (a, b) and a != b
