"""Findings over training runs: do runs of one task agree more, and how one run went on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.finding import Finding
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import runs_per_base

if TYPE_CHECKING:
    import pandas as pd


def run_comparisons(study: Study) -> Iterator[Finding]:
    """Compare runs of one task with runs of different tasks, rank by rank; a run is the unit."""
    one_dimension = study.similarities["dimension"].nunique() <= 1
    quantity = "omega" if one_dimension else "excess_r_r"
    for base, runs in runs_per_base(study):
        for rank in sorted({int(rank) for rank in runs["rank"].dropna()}):
            try:
                result = study.run_inference(quantity=quantity, rank=rank, base=base or None)
            except InputError:
                continue  # a rank of one task, or of one run each, has nothing to relabel
            if np.isnan([result.within[1], result.between[1]]).any():
                continue
            test = result.permutation
            yield Finding(
                "too-few-runs" if test.smallest_p_value > 0.05 else "runs-compared",
                {
                    "base": base or None,
                    "rank": rank,
                    "runs": result.n,
                    "tasks": len(set(result.tasks)),
                    "quantity": "ω" if one_dimension else "φ(r,r) excess",
                    "within": [float(value) for value in result.within],
                    "between": [float(value) for value in result.between],
                    "difference": test.difference,
                    "standard_error": result.standard_error if test.allows_interval else None,
                    "p": test.p_value,
                    "smallest_p": test.smallest_p_value,
                },
            )


def checkpoints(study: Study) -> Iterator[Finding]:
    """Report how far the checkpoints of one run were from its last."""
    for rows in overlaps_with_last_step(study):
        steps = [
            {"adapter": row.adapter, "step": int(row.step), "omega": float(row.omega)}
            for row in rows.itertuples(index=False)
        ]
        yield Finding("checkpoints", {"last": rows["last"].iloc[0], "steps": steps})


def overlaps_with_last_step(study: Study) -> Iterator[pd.DataFrame]:
    """Yield per run its earlier checkpoints by step, with ω and φ(1, 1) against its last.

    Columns: adapter, step, last, last_step, omega, phi_1_1 (medians over modules, output side).
    """
    rows = study.select(Relation.SAME_RUN, "output")
    if rows.empty:
        return
    step = study.runs.set_index("adapter")["step"]
    pairs = rows.groupby(["a", "b"], sort=False)[["omega", "phi_1_1"]].median().reset_index()
    later = pairs["a"].map(step) > pairs["b"].map(step)
    pairs["last"] = pairs["a"].where(later, pairs["b"])
    pairs["adapter"] = pairs["b"].where(later, pairs["a"])
    pairs["step"] = pairs["adapter"].map(step)
    pairs["last_step"] = pairs["last"].map(step)
    final = pairs[~pairs["last"].isin(pairs["adapter"])]
    columns = ["adapter", "step", "last", "last_step", "omega", "phi_1_1"]
    for _, steps in final.groupby("last", sort=False):
        yield steps.sort_values("step")[columns]
