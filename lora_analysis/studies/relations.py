"""How adapters are related by base, task, rank, seed and step, and which pairs are compared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import StrEnum
from itertools import combinations, islice, zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.adapter import Adapter
from lora_analysis.studies.base_identity import base_key, same_key


class Relation(StrEnum):
    """How two adapters are related by base, task, rank, seed and step."""

    OTHER_RANK = "same task, different rank"
    OTHER_SEED = "same task, different seed"
    OTHER_RANK_AND_SEED = "same task, different rank and seed"
    REPEATED = "same task, rank and seed"
    OTHER_TASK = "different task, different seed"
    SHARED_SEED = "different task, same seed"
    SHARED_SEED_OTHER_RANK = "different task, different rank, same seed"
    SAME_RUN = "same run, different step"
    EARLIER = "earlier step"  # not the last of its run: not used if the last one is present
    OTHER_BASE = "different base"
    BASE_NOT_KNOWN_SAME = "base not known to be the same"
    UNKNOWN = "unknown"


# Pairs that are compared only if the caller asks for them.
ACROSS_BASES = (Relation.OTHER_BASE, Relation.BASE_NOT_KNOWN_SAME)


def run_key(adapter: Adapter) -> Hashable | None:
    """Return a key that the checkpoints of one training run share; None if it is not known.

    Base, task, rank and seed if task and seed are known, else the parent folder of the checkpoint.
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
    last_labels = {adapter.label for adapter in last.values()}
    return {a.label for a in adapters if run_key(a) is not None and a.label not in last_labels}


def _step(adapter: Adapter) -> int:
    return adapter.provenance.step or 0


def relation(a: Adapter, b: Adapter) -> Relation:
    """Return how two adapters are related by base, task, rank, seed and step."""
    first, second = a.provenance, b.provenance
    bases = base_key(first.base_model), base_key(second.base_model)
    if None not in bases and not same_key(*bases):
        is_other = same_key(*bases) is False
        return Relation.OTHER_BASE if is_other else Relation.BASE_NOT_KNOWN_SAME
    if first.step != second.step and run_key(a) is not None and run_key(a) == run_key(b):
        return Relation.SAME_RUN
    if None in (first.task, second.task, first.seed, second.seed):
        return Relation.UNKNOWN
    if first.task == second.task and None in (first.rank, second.rank):
        return Relation.UNKNOWN
    same_rank = first.rank == second.rank
    if first.task != second.task:
        if first.seed != second.seed:
            return Relation.OTHER_TASK
        return Relation.SHARED_SEED if same_rank else Relation.SHARED_SEED_OTHER_RANK
    if first.seed == second.seed:
        return Relation.REPEATED if same_rank else Relation.OTHER_RANK
    return Relation.OTHER_SEED if same_rank else Relation.OTHER_RANK_AND_SEED


class ChosenPairs(NamedTuple):
    """The pairs of a study, by positions of the analyzed adapters followed by the reference.

    Attributes
    ----------
    tabulated
        Positions of the adapters in the tables of pairs, ascending.
    pairs
        ``(P, 2)``: positions of the two adapters of each pair.
    relations
        The relation of each pair.
    across_bases
        Number of pairs whose base models are not known to be the same, which are left out.
    """

    tabulated: list[int]
    pairs: NDArray[np.intp]
    relations: list[Relation]
    across_bases: int


def choose_pairs(
    adapters: Sequence[Adapter], reference: Sequence[Adapter], *, across_bases: bool, most: int
) -> ChosenPairs:
    """Return all pairs of the adapters and of the reference.

    Parameters
    ----------
    adapters, reference
        Analyzed adapters, and those that serve as the reference only.
    across_bases
        Whether pairs of base models that are not known to be the same are included.
    most
        Maximum number of adapters in the tables of pairs, see `choose_tabulated`.
    """
    every = (*adapters, *reference)
    tabulated = choose_tabulated(every, most)
    earlier = earlier_checkpoints(adapters)
    pairs: list[tuple[int, int]] = []
    relations: list[Relation] = []
    left_out = 0
    for a, b in combinations(tabulated, 2):
        kind = relation(every[a], every[b])
        if kind in ACROSS_BASES and not across_bases:
            left_out += 1
            continue
        superseded = not earlier.isdisjoint((every[a].label, every[b].label))
        if superseded and kind not in (Relation.SAME_RUN, *ACROSS_BASES):
            kind = Relation.EARLIER
        pairs.append((a, b))
        relations.append(kind)
    positions = np.array(pairs, dtype=np.intp).reshape(-1, 2)
    return ChosenPairs(tabulated, positions, relations, left_out)


def choose_tabulated(adapters: Sequence[Adapter], most: int) -> list[int]:
    """Return positions of at most ``most`` adapters, taken in turn from every task and rank."""
    if len(adapters) <= most:
        return list(range(len(adapters)))
    by_kind: dict[tuple[str | None, int | None], list[int]] = {}
    for index, adapter in enumerate(adapters):
        kind = (adapter.provenance.task, adapter.provenance.rank)
        by_kind.setdefault(kind, []).append(index)
    rounds = zip_longest(*by_kind.values())
    in_turn = (index for positions in rounds for index in positions if index is not None)
    return sorted(islice(in_turn, most))
