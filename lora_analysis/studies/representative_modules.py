"""Which pairs are compared module by module, and how the two are related."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, islice, zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.adapter import Adapter
from lora_analysis.studies.relations import (
    Relation,
    earlier_checkpoints,
    relation,
)


class ChosenPairs(NamedTuple):
    """Places of adapters, analyzed ones before the reference.

    ``tabulated`` are those that get into tables of pairs, ``pairs`` ``(P, 2)`` the pairs that are
    compared, ``relations`` how they are related; ``across`` counts pairs of different bases that
    are not compared.
    """

    tabulated: list[int]
    pairs: NDArray[np.intp]
    relations: list[Relation]
    across: int


def choose_pairs(
    adapters: Sequence[Adapter], reference: Sequence[Adapter], *, across_bases: bool, most: int
) -> ChosenPairs:
    """Return the pairs of the adapters, and of each with those of the reference."""
    every = (*adapters, *reference)
    tabulated = chosen_for_pairs(every, most)
    early = earlier_checkpoints(adapters)
    pairs: list[tuple[int, int]] = []
    relations: list[Relation] = []
    across = 0
    for a, b in combinations(tabulated, 2):
        if a >= len(adapters):
            continue  # two of the reference
        # The user says that these are unrelated; how they are related is not asked.
        related = _relation(every[a], every[b], early) if b < len(adapters) else Relation.REFERENCE
        if related == Relation.OTHER_BASE and not across_bases:
            across += 1
            continue
        pairs.append((a, b))
        relations.append(related)
    return ChosenPairs(tabulated, np.array(pairs, dtype=np.intp).reshape(-1, 2), relations, across)


def chosen_for_pairs(adapters: Sequence[Adapter], most: int) -> list[int]:
    """Return the places of at most ``most`` adapters, all kinds of task and rank among them.

    One of each kind in turn, in the order in which they are given, until there are enough.
    """
    if len(adapters) <= most:
        return list(range(len(adapters)))
    kinds: dict[tuple[str | None, int | None], list[int]] = {}
    for at, adapter in enumerate(adapters):
        kinds.setdefault((adapter.provenance.task, adapter.provenance.rank), []).append(at)
    in_turn = (at for turn in zip_longest(*kinds.values()) for at in turn if at is not None)
    return sorted(islice(in_turn, most))


def _relation(a: Adapter, b: Adapter, early: set[str]) -> Relation:
    """Return how two adapters are related; one that its run has left behind counts nowhere."""
    found = relation(a, b)
    if found not in (Relation.SAME_RUN, Relation.OTHER_BASE) and not early.isdisjoint(
        (a.label, b.label)
    ):
        return Relation.EARLIER
    return found
