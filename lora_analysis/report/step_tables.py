"""The table of a report about the steps of a training: what changed on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.conclusions.runs import last_steps
from lora_analysis.report.tables import ReportTable, cell
from lora_analysis.shared_init import drift
from lora_analysis.studies import Relation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_analysis.studies import Study


def steps_table(study: Study) -> ReportTable | None:
    """Return every checkpoint of a run by its step: overlap with the last, spectrum, A's drift.

    A's drift is from the checkpoint of step 0, where one is here. None without checkpoints.
    """
    spectra = study.spectra.groupby("adapter")[["stable_rank", "energy_rank_90"]].median()
    norms = study.runs.set_index("adapter")["norm"]
    enrichment = _enrichment(study)
    rows = []
    for rows_of_run in last_steps(study):
        last = str(rows_of_run["last"].iloc[0])
        overlaps = rows_of_run.set_index("adapter")[["phi_1_1", "omega"]]
        for label, step in _steps(study, last):
            start = next((one for one, at in _steps(study, last) if at == 0), None)
            turned, grown = _drift(study, label, start)
            known = overlaps.loc[label] if label in overlaps.index else (np.nan, np.nan)
            phi, omega = (1.0, 1.0) if label == last else known
            values = (phi, omega, norms[label], *spectra.loc[label], turned, grown)
            shown = [cell(float(value)) for value in values]
            if enrichment is not None:
                shown.insert(5, cell(float(enrichment.get(label, np.nan))))
            rows.append((last, str(step), *shown))
    if not rows:
        return None
    against = () if enrichment is None else ("enrichment",)
    columns = ("run", "step", "φ(1,1)", "ω", "‖ΔW‖", "stable rank", "90 % of energy", *against,
               "A turned", "A's size")  # fmt: skip
    caption = (
        "φ(1,1) and ω: with the run's last step, output side; they, the ranks and the enrichment "
        "are medians over modules. A turned: 1 − cos between A and A at step 0; A's size: "
        "‖A‖/‖A₀‖ − 1; – where step 0 was not saved."
    )
    return ReportTable("steps", caption, columns, tuple(rows), 1)


def _steps(study: Study, last: str) -> Iterator[tuple[str, int]]:
    """Yield the checkpoints of the run that ends with ``last``, by step."""
    pairs = study.pairs[study.pairs["relation"] == Relation.SAME_RUN]
    own = pairs[(pairs["a"] == last) | (pairs["b"] == last)]
    labels = {*own["a"], *own["b"]}
    steps = study.runs.set_index("adapter")["step"]
    yield from sorted(((label, int(steps[label])) for label in labels), key=lambda one: one[1])


def _drift(study: Study, label: str, start: str | None) -> tuple[float, float]:
    """Return the medians over modules of how far A turned and grew since step 0."""
    if start is None:
        return np.nan, np.nan
    found = [drift(one, first.A) for one, first in _both(study.adapters, label, start)]
    if not found:
        return np.nan, np.nan
    return (
        float(np.median([one.angular for one in found])),
        float(np.median([one.radial for one in found])),
    )


def _both(
    adapters: Mapping[str, Adapter], label: str, start: str
) -> Iterator[tuple[LowRankUpdate, LowRankUpdate]]:
    for name in adapters[label]:
        if name in adapters[start]:
            one, first = adapters[label][name], adapters[start][name]
            if isinstance(one, LowRankUpdate) and isinstance(first, LowRankUpdate):
                yield one, first


def _enrichment(study: Study) -> pd.Series | None:
    table = study.amplifications
    if table.empty:
        return None
    medians: pd.Series = table[table["at_rank"]].groupby("adapter")["enrichment"].median()
    return medians
