"""Rank test of one pair of adapters: are A and B the most alike among unrelated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pandas as pd

from lora_analysis import chance
from lora_analysis.studies.pair_classes import PairClass

if TYPE_CHECKING:
    from lora_analysis.spectra import Side
    from lora_analysis.studies.result import Study

# With five references of different tasks, A and B alone can be the most alike of 21 pairs.
REFERENCES_FOR_TEST: Final = 5
_SHARED_INIT_CLASSES = (PairClass.SHARED_INIT, PairClass.GRADIENTS_ALIKE, PairClass.SAME_SEED)
# Classes that labels alone decide, for references.
_BY_LABELS = (PairClass.SAME_SEED, PairClass.SHARED_INIT, PairClass.UNKNOWN)
# Quantities whose range over the references must hold for A and B.
StrengthQuantity = Literal["relative_norm", "norm", "participation_ratio", "rank"]


@dataclass(frozen=True, slots=True)
class OutOfRange:
    """A quantity in which A or B is outside the range of the references.

    ``low`` and ``high`` are the references' range, ``value`` is that of ``adapter``.
    """

    quantity: StrengthQuantity
    adapter: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ReferenceTest:
    """The rank of T(A, B) among the pairs of A, B and one reference adapter per task.

    Attributes
    ----------
    references
        The reference adapters used, one per task.
    rank, pairs
        A and B are the ``rank``-th most alike of the pairs, ties counted against them.
    p_value, smallest_p_value
        ``rank/pairs`` and ``1/pairs``.
    out_of_range
        Why the test does not hold: strength, shape or rank of A or B is outside the references'.
    shares_start
        Whether any two of the adapters share an initialization or a seed.
    """

    references: tuple[str, ...]
    rank: int
    pairs: int
    p_value: float
    smallest_p_value: float
    out_of_range: tuple[OutOfRange, ...]
    shares_start: bool


def reference_test(study: Study, a: str, b: str, side: Side = "output") -> ReferenceTest | None:
    """Return the rank test of a pair among unrelated adapters; None without a reference.

    Exact if A and B are exchangeable with the references when they are unrelated, which they are
    not if they were trained more strongly: strangers trained twice as hard are the most alike in
    35 to 67 % of simulated comparisons. So there is no test if ‖ΔW‖/‖W‖ (without a base ‖ΔW‖), the
    participation ratio or the rank of A or B is outside the range of the references.

    Parameters
    ----------
    study
        Study of A, B and the reference adapters.
    a, b
        Labels of the two adapters.
    side
        The side of the overlap; the output side is the primary test.
    """
    references = choose_references(study, a, b)
    if not references:
        return None
    members = (a, b, *references)
    index = {label: i for i, label in enumerate(members)}
    mean_excess = np.full((len(members), len(members)), np.nan)
    np.fill_diagonal(mean_excess, 0.0)
    rows = study.pairs[study.pairs["a"].isin(index) & study.pairs["b"].isin(index)]
    for x, y, value in zip(rows["a"], rows["b"], rows[f"mean_excess_{side}"], strict=True):
        mean_excess[index[x], index[y]] = mean_excess[index[y], index[x]] = value
    if np.isnan(mean_excess).any():
        return None
    test = chance.rank_test(mean_excess)
    strength = training_strength(study)
    every = strength.loc[list(members)]
    has_relative = "relative_norm" in every and bool(every["relative_norm"].notna().all())
    quantities: tuple[StrengthQuantity, ...] = (
        "relative_norm" if has_relative else "norm",
        "participation_ratio",
        "rank",
    )
    outside = []
    for quantity in quantities:
        values = strength.loc[list(references), quantity]
        low, high = float(values.min()), float(values.max())
        for label in (a, b):
            of_adapter = float(strength.loc[label, quantity])
            if not low <= of_adapter <= high:
                outside.append(OutOfRange(quantity, label, of_adapter, low, high))
    return ReferenceTest(
        references=references,
        rank=test.rank,
        pairs=test.pairs,
        p_value=test.p_value,
        smallest_p_value=test.smallest_p_value,
        out_of_range=tuple(outside),
        shares_start=bool(
            rows["pair_class"].isin(_SHARED_INIT_CLASSES).any()
            or (rows["shared_init_modules"] > 0).any()
        ),
    )


def choose_references(study: Study, a: str, b: str) -> tuple[str, ...]:
    """Return one reference adapter per task: the nearest in rank, then in ‖ΔW‖.

    The choice looks at no similarity. Adapters of an unknown task are a task each. Only adapters
    whose pairs with A and B are unrelated are used; others serve neither test nor level.
    """
    runs = study.runs.set_index("adapter")
    unrelated = study.pairs[study.pairs["population_output"] == "unrelated"]
    of_pair = [
        set(unrelated.loc[unrelated["b"] == name, "a"])
        | set(unrelated.loc[unrelated["a"] == name, "b"])
        for name in (a, b)
    ]
    candidates = runs.loc[[label for label in runs.index if label in of_pair[0] & of_pair[1]]]
    if candidates.empty:
        return ()
    pair = runs.loc[[a, b]]
    distance = pd.DataFrame(
        {
            "task": [
                task if isinstance(task, str) else f"\0{label}"
                for label, task in candidates["task"].items()
            ],
            "rank": (candidates["rank"] - pair["rank"].mean()).abs().fillna(np.inf),
            "norm": np.log(candidates["norm"] / np.sqrt(pair["norm"].prod())).abs(),
        }
    )
    nearest = distance.sort_values(["rank", "norm"], kind="stable").drop_duplicates("task")
    return tuple(label for label in candidates.index if label in nearest.index)


@dataclass(frozen=True, slots=True)
class RefusedReference:
    """A reference adapter that is not unrelated to some of the analyzed adapters.

    ``reason`` is "same seed" if the labels say so, else why the reference is excluded, or the class
    of the pairs.
    """

    reference: str
    reason: str
    adapters: tuple[str, ...]


def refused_references(study: Study) -> tuple[RefusedReference, ...]:
    """Return the references that serve neither test nor level for some of the adapters, and why."""
    runs = study.runs.set_index("adapter")
    refused: dict[tuple[str, str], list[str]] = {}
    for row in study.pairs.itertuples():
        # Analyzed adapters stand first.
        if row.b not in study.reference or row.a in study.reference:
            continue
        excluded = str(runs.loc[row.b, "excluded"])
        if row.population_output == "unrelated" or (runs.loc[row.a, "excluded"] and not excluded):
            continue
        reason = excluded
        if not reason:  # references of the adapters' tasks are refused as errors
            seeds = runs.loc[[row.a, row.b], "seed"]
            is_one_seed = seeds.notna().all() and seeds.nunique() == 1
            by_seed = row.pair_class in _BY_LABELS and is_one_seed
            reason = "same seed" if by_seed else str(row.pair_class)
        refused.setdefault((row.b, reason), []).append(row.a)
    return tuple(
        RefusedReference(reference, reason, tuple(adapters))
        for (reference, reason), adapters in refused.items()
    )


def training_strength(study: Study) -> pd.DataFrame:
    """Return per adapter what makes unrelated adapters alike: norms, participation ratio, rank.

    Columns: relative_norm (median of ‖ΔW‖/‖W‖ over modules, if a base was given), norm,
    participation_ratio (median over modules), rank.
    """
    runs = study.runs.set_index("adapter")
    strength = runs[["norm", "rank"]].astype(float)
    by_adapter = study.spectra.groupby("adapter")
    strength["participation_ratio"] = by_adapter["participation_ratio"].median()
    at_rank = study.amplifications
    if len(at_rank):
        at_rank = at_rank[at_rank["at_rank"].astype(bool)]
        strength["relative_norm"] = at_rank.groupby("adapter")["relative_norm"].median()
    return strength
