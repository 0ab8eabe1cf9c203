"""Summaries of φ(1, 1) over groups of pairs, and what they say next to unrelated adapters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.chance import excess
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import base_keys

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.spectra import Side

# The output side leads: what an update writes is not diluted by its initial A.
SIDES_IN_ORDER: tuple[Side, Side] = ("output", "input")
# Fewer pairs do not show what unrelated adapters give.
MIN_REFERENCE_PAIRS = 3


class Conclusion(StrEnum):
    """The outcome of comparing a group of pairs with reference pairs, on one side."""

    MORE_ALIKE = "more alike than unrelated adapters"
    PARTLY_MORE_ALIKE = "more alike than unrelated adapters in part of the modules"
    NOT_DISTINGUISHABLE = "not distinguishable from unrelated adapters"
    NO_REFERENCE = "inconclusive without reference pairs"
    FEW_REFERENCE_PAIRS = "inconclusive with too few reference pairs"

    @property
    def is_inconclusive(self) -> bool:
        """True without enough reference pairs."""
        return self in (Conclusion.NO_REFERENCE, Conclusion.FEW_REFERENCE_PAIRS)


@dataclass(frozen=True, slots=True, eq=False)
class OverlapSummary:
    """The distribution of φ(1, 1) over a group of pairs.

    Attributes
    ----------
    values
        One per module and pair.
    pair_medians
        Median over modules, for each pair: the unit of every conclusion.
    modules
        Modules per pair, at most.
    chance
        The random baseline of φ(1, 1); 0 if the values are excesses.
    is_excess
        True if the values are the excess over the random baseline, ``(φ − c)/(1 − c)``.
    excluded
        Number of rows that were excluded, see `summarize_overlaps`.
    """

    values: NDArray[np.float64]
    pair_medians: tuple[float, ...]
    modules: int
    chance: float
    is_excess: bool
    excluded: int

    def quantile(self, share: float) -> float:
        """Return a quantile of the values."""
        return float(np.quantile(self.values, share))

    @property
    def median(self) -> float:
        """The median of the values."""
        return self.quantile(0.5)

    @property
    def pairs(self) -> int:
        """Number of pairs with a value."""
        return len(self.pair_medians)

    @property
    def quantity(self) -> str:
        """Name of the values in tables and sentences."""
        return "φ(1,1) excess" if self.is_excess else "φ(1,1)"


def summarize_overlaps(
    rows: pd.DataFrame, *, as_excess: bool | None = None
) -> OverlapSummary | None:
    """Return the summary of φ(1, 1) over rows of ``Study.similarities``; None if none count.

    Excluded are degenerate first directions, pairs from the same training run, and input sides
    with a shared initialization. If modules differ in dimension, so does the random baseline, and
    the excess ``(φ − c)/(1 − c)`` takes the place of φ.

    Parameters
    ----------
    as_excess
        Take the excess even if all modules have one dimension; needed if the summary is compared
        with one over modules of several dimensions.
    """
    counted = rows[
        (rows["initialization"] != InitRelation.SAME_RUN)
        & (rows["degeneracy_1_1"] == "")
        & ~(rows["shared_init"] & (rows["side"] == "input"))
    ]
    if counted.empty:
        return None
    is_excess = bool(as_excess) or bool(counted["dimension"].nunique() > 1)
    phi, expected = counted["phi_1_1"], counted["chance_1_1"]
    values = excess(phi, expected) if is_excess else phi
    by_pair = counted.assign(value=values).groupby(["a", "b"], sort=False)["value"]
    return OverlapSummary(
        np.asarray(values, dtype=np.float64),
        tuple(float(median) for median in by_pair.median()),
        int(by_pair.size().max()),
        0.0 if is_excess else float(expected.iloc[0]),
        is_excess,
        len(rows) - len(counted),
    )


def study_summary(study: Study, rows: pd.DataFrame) -> OverlapSummary | None:
    """Return the summary of rows on the one scale of the study.

    Chosen group by group, φ of square modules would be compared with the reference's excess
    if the reference has modules of other dimensions.
    """
    return summarize_overlaps(rows, as_excess=study.similarities["dimension"].nunique() > 1)


def reference_rows(study: Study, rows: pd.DataFrame, side: Side) -> pd.DataFrame:
    """Return the unrelated pairs on the bases and module types of ``rows``.

    An adapter that names no base may be of any.
    """
    reference = study.select(Relation.REFERENCE, side)
    reference = reference[reference["module_type"].isin(rows["module_type"])]
    keys = base_keys(study)
    bases = {keys[label] for column in ("a", "b") for label in rows[column].unique()}
    if None in bases:
        return reference
    # By number: of an empty table, an empty list would choose columns.
    numbered = enumerate(keys[label] for label in reference["a"])
    return reference.iloc[[i for i, base in numbered if base is None or base in bases]]


def side_conclusion(study: Study, rows: pd.DataFrame, side: Side) -> dict[str, Any] | None:
    """Return the fields of a conclusion about one side of a group of pairs; None if none count.

    The group is more alike than unrelated adapters if the median of each pair exceeds that of
    every reference pair, and at least half of the values exceed 95 % of the reference values; 5 %
    of the values of unrelated pairs do.
    """
    rows = rows[rows["side"] == side]
    summary = study_summary(study, rows)
    if summary is None:
        return None
    reference = study_summary(study, reference_rows(study, rows, side))
    above = None
    if reference is None:
        conclusion = Conclusion.NO_REFERENCE
    else:
        above = int((summary.values > reference.quantile(0.95)).sum())
        conclusion = _conclusion(summary, reference, above / len(summary.values))
    return {
        "side": side,
        "conclusion": str(conclusion),
        "quantity": summary.quantity,
        "median": summary.median,
        "quartiles": [summary.quantile(0.25), summary.quantile(0.75)],
        "chance": summary.chance,
        "pairs": summary.pairs,
        "modules": summary.modules,
        "values": len(summary.values),
        "excluded": summary.excluded,
        "above_reference": above,
        "reference": reference.median if reference else None,
        "reference_pairs": reference.pairs if reference else 0,
    }


def _conclusion(summary: OverlapSummary, reference: OverlapSummary, above: float) -> Conclusion:
    """Return the conclusion; ``above`` is the share of values above 95 % of the reference's."""
    if reference.pairs < MIN_REFERENCE_PAIRS:
        return Conclusion.FEW_REFERENCE_PAIRS
    if above >= 0.5 and min(summary.pair_medians) > max(reference.pair_medians):
        return Conclusion.MORE_ALIKE
    return Conclusion.PARTLY_MORE_ALIKE if above >= 0.25 else Conclusion.NOT_DISTINGUISHABLE
