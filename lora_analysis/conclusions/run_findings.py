"""Findings on the checkpoints of one training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_analysis.finding import Finding
from lora_analysis.studies import Relation, Study

if TYPE_CHECKING:
    import pandas as pd


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
