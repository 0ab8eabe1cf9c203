"""How adapters are related by base, task, rank, seed and step, and which pairs are compared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import chain, combinations, pairwise, product, zip_longest
from math import comb, isqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.adapter import Adapter
from lora_analysis.studies.base_identity import base_key, is_same_key

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.amplify import Amplification


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
    """Return the training step of an adapter; 0 if it is unknown."""
    return adapter.provenance.step or 0


def relation(a: Adapter, b: Adapter) -> Relation:
    """Return how two adapters are related by base, task, rank, seed and step."""
    first, second = a.provenance, b.provenance
    bases = base_key(first.base_model), base_key(second.base_model)
    if None not in bases and not is_same_key(*bases):
        is_other = is_same_key(*bases) is False
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
    blocks
        Positions of adapters that are all compared with each other, ascending; an adapter is in at
        most one block. The first block is the largest.
    pairs
        ``(P, 2)``: positions of the two adapters of each pair.
    relations
        The relation of each pair.
    across_bases
        Number of pairs whose base models are not known to be the same, which are left out.
    """

    blocks: list[list[int]]
    pairs: NDArray[np.intp]
    relations: list[Relation]
    across_bases: int


def choose_pairs(
    adapters: Sequence[Adapter], reference: Sequence[Adapter], *, across_bases: bool, max_pairs: int
) -> ChosenPairs:
    """Return all pairs of the adapters and of the reference, or at most ``max_pairs`` of them.

    Parameters
    ----------
    adapters, reference
        Analyzed adapters, and those that serve as the reference only.
    across_bases
        Whether pairs of base models that are not known to be the same are included.
    max_pairs
        Maximum number of pairs, see `choose_blocks`.
    """
    every = (*adapters, *reference)
    blocks = choose_blocks(every, max_pairs)
    earlier = earlier_checkpoints(adapters)
    pairs: list[tuple[int, int]] = []
    relations: list[Relation] = []
    left_out = 0
    for a, b in sorted(pair for block in blocks for pair in combinations(block, 2)):
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
    return ChosenPairs(blocks, positions, relations, left_out)


def choose_blocks(adapters: Sequence[Adapter], max_pairs: int) -> list[list[int]]:
    """Return the positions of all adapters in blocks that have at most ``max_pairs`` pairs.

    If not all pairs are allowed, the first block is as large as possible, for statistics that need
    every pair of their adapters; the other adapters are in small blocks of about equal size. Each
    block has replicates (one task and rank, two seeds) and unrelated adapters (other tasks and
    seeds), if there are any. Adapters are left out only if three quarters of the maximum are not a
    pair for each.
    """
    if comb(len(adapters), 2) <= max_pairs:
        return [list(range(len(adapters)))]
    units = _units_of_replicates(adapters)
    largest = min(isqrt(2 * max_pairs) // 2 + 1, len(units))
    smallest = max(isqrt(max_pairs // 2) // 2, 1)  # a quarter of the pairs
    # Two units have replicates and unrelated adapters; one is better than none.
    for least, first in product((2, 1), range(largest, smallest - 1, -1)):
        most = max((len(units) - first) // least, 1)
        if _count_pairs(_split_blocks(units, first, most)) <= max_pairs:
            # n adapters in B blocks of one size have n(n/B − 1)/2 pairs: a bound for the search.
            n = sum(map(len, units[first:]))
            budget = max_pairs - comb(sum(map(len, units[:first])), 2)
            blocks = next(
                blocks
                for count in range(max(n**2 // (2 * budget + n), 1), most + 1)
                if _count_pairs(blocks := _split_blocks(units, first, count)) <= max_pairs
            )
            return sorted(map(sorted, blocks), key=len, reverse=True)
    core = sorted(index for unit in units[:smallest] for index in unit[:2])
    end = smallest + max_pairs - comb(len(core), 2)
    return [core, *(sorted(unit[:2]) for unit in units[smallest:end])]


def _units_of_replicates(adapters: Sequence[Adapter]) -> list[list[int]]:
    """Return the positions of all adapters in twos (or threes), of one task and rank if possible.

    Neighbors are of different tasks, as far as there are several, and each task and rank starts
    with other seeds than the one before.
    """
    tasks: dict[str | None, dict[int | None, list[int]]] = {}
    for index, adapter in enumerate(adapters):
        ranks = tasks.setdefault(adapter.provenance.task, {})
        ranks.setdefault(adapter.provenance.rank, []).append(index)
    by_rank = zip_longest(*(ranks.values() for ranks in tasks.values()), fillvalue=[])
    turns = []
    for shift, members in enumerate(filter(None, chain.from_iterable(by_rank))):
        units = _pair_up(members)
        turns.append(units[shift % len(units) :] + units[: shift % len(units)])
    in_turn = list(filter(None, chain.from_iterable(zip_longest(*turns))))
    singles = [index for unit in in_turn if len(unit) == 1 for index in unit]
    units = [unit for unit in in_turn if len(unit) > 1]
    if len(singles) == 1:
        units[-1].extend(singles)
    elif singles:
        units += _pair_up(singles)
    return units


def _split_blocks(units: Sequence[Sequence[int]], first: int, count: int) -> list[list[int]]:
    """Return the first units as one block, and the others in ``count`` blocks of about one size."""
    rest = len(units) - first
    ends = [0, *(first + rest * i // count for i in range(count + 1))]
    return [list(chain.from_iterable(units[i:j])) for i, j in pairwise(ends) if i < j]


def _count_pairs(blocks: Sequence[Sequence[int]]) -> int:
    return sum(comb(len(block), 2) for block in blocks)


def _pair_up(members: Sequence[int]) -> list[list[int]]:
    """Return members two by two, the last three together if their number is odd."""
    starts = range(0, max(len(members) - 1, 1), 2)
    units = [list(members[start : start + 2]) for start in starts]
    if len(members) % 2 and len(members) > 1:
        units[-1].append(members[-1])
    return units


_MAY_BE_UNRELATED = (Relation.OTHER_TASK, Relation.UNKNOWN)


def candidate_pairs(pairs: ChosenPairs) -> set[tuple[int, int]]:
    """Return the pairs that may turn out to be unrelated, by positions of the adapters."""
    return {
        (int(a), int(b))
        for (a, b), relation in zip(pairs.pairs, pairs.relations, strict=True)
        if relation in _MAY_BE_UNRELATED
    }


def keep_unrelated(
    amplified: Mapping[tuple[str, str], Amplification], pairs: pd.DataFrame
) -> dict[tuple[str, str], Amplification]:
    """Return the amplifications with the crossed values of unrelated pairs only."""
    unrelated = pairs[pairs["population_output"] == "unrelated"]
    partners: dict[str, set[str]] = {}
    for a, b in zip(unrelated["a"], unrelated["b"], strict=True):
        partners.setdefault(a, set()).add(b)
        partners.setdefault(b, set()).add(a)
    return {
        key: value
        if value.crossed is None
        else replace(value, crossed=value.crossed.select(partners.get(value.label, ())))
        for key, value in amplified.items()
    }
