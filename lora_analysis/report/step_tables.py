"""The table of a report about the checkpoints of training runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.conclusions.run_findings import overlaps_with_last_step
from lora_analysis.report.tables import ReportTable, cell
from lora_analysis.shared_init import drift
from lora_analysis.studies import Relation

if TYPE_CHECKING:
    from lora_analysis.studies import Study


def steps_table(study: Study) -> ReportTable | None:
    """Return the checkpoints of each run by step: overlap with the last, spectrum, A's drift.

    A's drift is from the checkpoint of step 0, if there is one. None without checkpoints.
    """
    spectra = study.spectra.groupby("adapter")[["stable_rank", "energy_rank_90"]].median()
    norms = study.runs.set_index("adapter")["norm"]
    enrichment = _enrichment(study)
    rows = []
    for rows_of_run in overlaps_with_last_step(study):
        last = str(rows_of_run["last"].iloc[0])
        overlaps = rows_of_run.set_index("adapter")[["phi_1_1", "omega"]]
        checkpoints = _checkpoints(study, last)
        first = next((label for label, step in checkpoints if step == 0), None)
        for label, step in checkpoints:
            drifts = _drift(study, label, first)
            overlap = overlaps.loc[label] if label in overlaps.index else (np.nan, np.nan)
            phi, omega = (1.0, 1.0) if label == last else overlap
            cells = [cell(float(x)) for x in (phi, omega, norms[label], *spectra.loc[label])]
            if enrichment is not None:
                cells.append(cell(float(enrichment.get(label, np.nan))))
            rows.append((last, str(step), *cells, *(cell(drift) for drift in drifts)))
    if not rows:
        return None
    against = () if enrichment is None else ("enrichment",)
    columns = ("run", "step", "φ(1,1)", "ω", "‖ΔW‖", "stable rank", "90 % of energy", *against,
               "A's rotation", "A's growth")  # fmt: skip
    caption = (
        "φ(1,1) and ω: with the run's last step, output side. They, the ranks and the enrichment "
        "are medians over modules. A's rotation: 1 − cos between A and A at step 0; A's growth: "
        "‖A‖/‖A₀‖ − 1; –: step 0 was not saved."
    )
    return ReportTable("steps", caption, columns, tuple(rows), 1)


def _checkpoints(study: Study, last: str) -> list[tuple[str, int]]:
    """Return labels and steps of the run that ends with ``last``, in order."""
    pairs = study.pairs[study.pairs["relation"] == Relation.SAME_RUN]
    pairs = pairs[(pairs["a"] == last) | (pairs["b"] == last)]
    labels = {*pairs["a"], *pairs["b"]}
    steps = study.runs.set_index("adapter")["step"]
    return sorted(((label, int(steps[label])) for label in labels), key=lambda pair: pair[1])


def _drift(study: Study, label: str, first: str | None) -> tuple[float, float]:
    """Return the rotation and growth of A since step 0, medians over modules."""
    if first is None:
        return np.nan, np.nan
    drifts = []
    for name, update in study.adapters[label].items():
        start = study.adapters[first].get(name)
        if isinstance(update, LowRankUpdate) and isinstance(start, LowRankUpdate):
            drifts.append(drift(update, start.A))
    if not drifts:
        return np.nan, np.nan
    medians = np.median([(module.angular, module.radial) for module in drifts], axis=0)
    return float(medians[0]), float(medians[1])


def _enrichment(study: Study) -> pd.Series | None:
    table = study.amplifications
    if table.empty:
        return None
    medians: pd.Series = table[table["at_rank"]].groupby("adapter")["enrichment"].median()
    return medians
