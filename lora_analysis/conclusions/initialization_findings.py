"""Findings about initializations: which pairs share one, and what that does to their overlap."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.conclusions.comparison_values import PAIRS_IN_WORDS, SIDES_IN_ORDER
from lora_analysis.finding import Finding
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import per_base
from lora_analysis.studies.pair_classes import PairClass, have_conflicting_tasks

if TYPE_CHECKING:
    import pandas as pd

_CODES: Final = {
    PairClass.NEAR_DUPLICATE: "near-duplicates",
    PairClass.NEGATED_COPY: "negated-copies",
    PairClass.CONTAINED: "contained",
    PairClass.SAME_RUN: "same-run",
    PairClass.STARTED_FROM_BASE: "started-from-base",
    PairClass.GRADIENTS_ALIKE: "gradients-alike",
    PairClass.SHARED_INIT: "shared-initialization",
}
_SAME_SPACE = (InitRelation.SAME_SPACE, InitRelation.UNDECIDED)
_SHARED = (InitRelation.SHARED, InitRelation.PARTLY_SHARED)


def report_init_classes(study: Study) -> Iterator[Finding]:
    """Report pairs that are one sample or share their initialization, class by class.

    Pairs of different tasks and one seed are in `report_shared_seeds`, those of one run in
    `report_checkpoints`.
    """
    pairs = study.pairs
    of_labels = (pairs["relation"] == Relation.SHARED_SEED) & (
        pairs["pair_class"] == PairClass.SHARED_INIT
    )
    pairs = pairs[~of_labels & (pairs["relation"] != Relation.SAME_RUN)]
    is_conflict = have_conflicting_tasks(pairs, study.runs)
    yield from _class_findings("conflicting-labels", pairs[is_conflict])
    pairs = pairs[~is_conflict]
    for pair_class, rows in pairs.groupby("pair_class", sort=False):
        code = _CODES.get(PairClass(pair_class))
        if code == "shared-initialization":
            by_space = rows["initialization"].isin(_SAME_SPACE)
            yield from _class_findings("same-input-space", rows[by_space])
            rows = rows[~by_space]  # noqa: PLW2901 - the others
        if code is not None:
            yield from _class_findings(code, rows)
    counted = pairs[~pairs["pair_class"].isin(_CODES)]
    for initialization, code in (
        (InitRelation.PARTLY_SHARED, "partly-shared-initialization"),
        (InitRelation.INCONCLUSIVE, "initialization-inconclusive"),
    ):
        yield from _class_findings(code, counted[counted["initialization"] == initialization])
    # Of many adapters, only a sample is compared in pairs; near-duplicates are among all of them.
    if study.similarity_matrix is not None and len(study.fully_compared) < len(study.adapters):
        compared = set(zip(study.pairs["a"], study.pairs["b"], strict=True))
        for group in study.similarity_matrix.duplicates():
            if not compared.issuperset(combinations(group, 2)):
                count = len(group) * (len(group) - 1) // 2
                fields = {"a": group[0], "b": group[1], "pairs": count if count > 1 else None}
                yield Finding("near-duplicates", fields)


def _class_findings(code: str, rows: pd.DataFrame) -> Iterator[Finding]:
    """Yield one finding per pair if they are few, else one for all."""
    if len(rows) > PAIRS_IN_WORDS:
        yield Finding(code, _pair_fields(rows) | {"pairs": len(rows)})
        return
    for i in range(len(rows)):
        yield Finding(code, _pair_fields(rows.iloc[[i]]) | {"pairs": None})


def _pair_fields(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the names of the first pair, and medians over all of them (counts stay integers)."""
    counts = rows[["shared_init_modules", "modules"]].quantile(0.5, interpolation="lower")
    medians = rows[["b_cosine", "containment"]].astype(float).median()
    return {
        "a": rows["a"].iloc[0],
        "b": rows["b"].iloc[0],
        "pair_class": str(rows["pair_class"].iloc[0]),
        **{name: value if np.isfinite(value) else 0.0 for name, value in medians.items()},
        "shared_modules": int(counts["shared_init_modules"]),
        "modules": int(counts["modules"]),
    }


def report_shared_seeds(study: Study) -> Iterator[Finding]:
    """Report what a shared initial A does to adapters of different tasks, base by base."""
    every = study.pairs[study.pairs["relation"] == Relation.SHARED_SEED]
    unrelated = study.similarities[study.similarities["population"] == "unrelated"]
    for base, pairs in per_base(study, every):
        whole, partly = (int((pairs["initialization"] == shared).sum()) for shared in _SHARED)
        if not whole + partly:
            continue
        named = set(zip(pairs["a"], pairs["b"], strict=True))
        # φ(r, r) of modules with a shared A, and of unrelated pairs of the same ranks.
        sides = []
        for side in SIDES_IN_ORDER:
            rows = study.select(Relation.SHARED_SEED, side)
            in_pairs = [pair in named for pair in zip(rows["a"], rows["b"], strict=True)]
            rows = rows[rows["shared_init"] & np.array(in_pairs, dtype=bool)]
            reference = unrelated[
                (unrelated["side"] == side)
                & unrelated["rank_a"].isin(rows["rank_a"])
                & unrelated["rank_b"].isin(rows["rank_b"])
            ]
            median = reference["phi_r_r"].median()
            sides.append(
                {
                    "side": side,
                    "phi_r_r": float(rows["phi_r_r"].median()),
                    "reference": float(median) if np.isfinite(median) else None,
                    "chance_r_r": float(rows["chance_r_r"].median()),
                }
            )
        counts = {"pairs": whole + partly, "whole": whole, "partly": partly}
        yield Finding("shared-seed", {"base": base or None, **counts, "sides": sides})


def report_degenerate_directions(study: Study) -> Iterator[Finding]:
    """Report how many first directions are not well defined, and so are excluded."""
    rows = study.similarities
    rows = rows[rows["side"] == "output"]
    counts = rows["degeneracy_1_1"].value_counts()
    degenerate, nearly = (int(counts.get(key, 0)) for key in ("degenerate", "nearly degenerate"))
    if degenerate + nearly:
        yield Finding(
            "degenerate-directions",
            {
                "count": degenerate + nearly,
                "comparisons": len(rows),
                "degenerate": degenerate,
                "nearly_degenerate": nearly,
            },
        )
