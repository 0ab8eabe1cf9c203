"""Which adapters are crossed with each other as a control of the enrichment.

The class of a pair is known only when all modules are analyzed, and W is read module by module:
pairs that may be unrelated are crossed first, and those that are not are dropped at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_analysis.studies.relations import ChosenPairs, Relation

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.amplify import Amplification

_MAY_BE_UNRELATED = (Relation.OTHER_TASK, Relation.UNKNOWN)


def candidate_pairs(pairs: ChosenPairs) -> set[tuple[int, int]]:
    """Return the pairs that may turn out to be unrelated, by positions of the adapters."""
    return {
        (int(a), int(b))
        for (a, b), relation in zip(pairs.pairs, pairs.relations, strict=True)
        if relation in _MAY_BE_UNRELATED
    }


def unrelated_partners(pairs: pd.DataFrame) -> dict[str, set[str]]:
    """Return the unrelated adapters of each adapter, from the table of pairs of a study."""
    unrelated = pairs[pairs["population_output"] == "unrelated"]
    partners: dict[str, set[str]] = {}
    for a, b in zip(unrelated["a"], unrelated["b"], strict=True):
        partners.setdefault(a, set()).add(b)
        partners.setdefault(b, set()).add(a)
    return partners


def only_unrelated(
    amplified: Mapping[tuple[str, str], Amplification], pairs: pd.DataFrame
) -> dict[tuple[str, str], Amplification]:
    """Return the amplifications with the crossed values of unrelated pairs only."""
    partners = unrelated_partners(pairs)
    return {
        key: value
        if value.crossed is None
        else replace(value, crossed=value.crossed.select(partners.get(value.label, ())))
        for key, value in amplified.items()
    }
