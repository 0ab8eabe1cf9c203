"""Findings about initializations: which pairs share one, and what that does to their overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.conclusions.overlap_findings import PAIRS_IN_WORDS
from lora_analysis.conclusions.overlap_summaries import SIDES_IN_ORDER, reference_rows
from lora_analysis.finding import Finding
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import per_base

if TYPE_CHECKING:
    import pandas as pd

_CODES = {
    InitRelation.SAME_RUN: "same-run",
    InitRelation.SHARED: "shared-initialization",
    InitRelation.PARTLY_SHARED: "partly-shared-initialization",
    InitRelation.SAME_SPACE: "same-input-space",
    InitRelation.INCONCLUSIVE: "initialization-inconclusive",
}
_SHARED = (InitRelation.SHARED, InitRelation.PARTLY_SHARED)


def shared_initializations(study: Study) -> Iterator[Finding]:
    """Report pairs that are one sample or share their initialization, if no seed explains it.

    `shared_seeds` covers pairs of different tasks and one seed, `checkpoints` those of one run.
    """
    pairs = study.pairs[study.pairs["initialization"].isin(_CODES)]
    explained = (pairs["relation"] == Relation.SHARED_SEED) & pairs["initialization"].isin(_SHARED)
    pairs = pairs[~explained & (pairs["relation"] != Relation.SAME_RUN)]
    for initialization, rows in pairs.groupby("initialization", sort=False):
        code = _CODES[InitRelation(initialization)]
        if len(rows) > PAIRS_IN_WORDS:
            yield Finding(code, _initialization_fields(rows) | {"pairs": len(rows)})
            continue
        for i in range(len(rows)):
            yield Finding(code, _initialization_fields(rows.iloc[[i]]) | {"pairs": None})


def _initialization_fields(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the names of the first pair, and medians over all of them (counts stay integers)."""
    b_cosine = float(rows["b_cosine"].astype(float).median())
    counts = rows[["shared_init_modules", "modules"]].quantile(0.5, interpolation="lower")
    return {
        "a": rows["a"].iloc[0],
        "b": rows["b"].iloc[0],
        "b_cosine": b_cosine if np.isfinite(b_cosine) else 0.0,
        "shared_modules": int(counts["shared_init_modules"]),
        "modules": int(counts["modules"]),
    }


def shared_seeds(study: Study) -> Iterator[Finding]:
    """Show what a shared initial A does to adapters of different tasks, base by base."""
    pairs = study.pairs[study.pairs["relation"] == Relation.SHARED_SEED]
    for base, rows in per_base(study, pairs):
        whole, partly = (int((rows["initialization"] == shared).sum()) for shared in _SHARED)
        if whole + partly:
            yield Finding(
                "shared-seed",
                {
                    "base": base or None,
                    "pairs": whole + partly,
                    "whole": whole,
                    "partly": partly,
                    "sides": list(_shared_seed_sides(study, rows)),
                },
            )


def _shared_seed_sides(study: Study, pairs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield φ(r, r) of modules with a shared A, and of unrelated pairs of the same ranks."""
    named = set(zip(pairs["a"], pairs["b"], strict=True))
    for side in SIDES_IN_ORDER:
        rows = study.select(Relation.SHARED_SEED, side)
        in_pairs = [pair in named for pair in zip(rows["a"], rows["b"], strict=True)]
        rows = rows[rows["shared_init"] & np.array(in_pairs, dtype=bool)]
        reference = reference_rows(study, rows, side)
        # φ(r, r) depends on r.
        same_ranks = reference["rank_a"].isin(rows["rank_a"]) & reference["rank_b"].isin(
            rows["rank_b"]
        )
        median = reference.loc[same_ranks, "phi_r_r"].median()
        yield {
            "side": side,
            "phi_r_r": float(rows["phi_r_r"].median()),
            "reference": float(median) if np.isfinite(median) else None,
            "chance_r_r": float(rows["chance_r_r"].median()),
        }


def degenerate_directions(study: Study) -> Iterator[Finding]:
    """Count the first directions that are not well defined, and so are excluded."""
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
