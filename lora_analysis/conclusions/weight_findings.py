"""Findings about single adapters next to W, their spectra and their accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_analysis.finding import Finding
from lora_analysis.studies import Study
from lora_analysis.studies.base_models import other_bases, strange_name

if TYPE_CHECKING:
    import pandas as pd


def damaged_base(study: Study) -> Iterator[Finding]:
    """Pass on what is wrong with the numbers of the base."""
    yield from (finding for finding in study.base_findings() if finding.severity == "damage")


def unusual_base(study: Study) -> Iterator[Finding]:
    """Pass on what else was noticed about the base."""
    yield from (finding for finding in study.base_findings() if finding.severity != "damage")


def missing_weights(study: Study) -> Iterator[Finding]:
    """Name modules without a weight in the base."""
    if study.unmatched:
        module, reason = next(iter(study.unmatched.items()))
        fields = {"count": len(study.unmatched), "module": module, "reason": reason}
        yield Finding("no-base-weight", fields)


def different_base(study: Study) -> Iterator[Finding]:
    """Name adapters of another base than the given one, or a base that may be another model."""
    if study.base is None:
        return
    runs = study.runs[~study.runs["adapter"].isin(study.reference)]
    base_of = {
        label: name if isinstance(name, str) else None
        for label, name in zip(runs["adapter"], runs["base_model"], strict=True)
    }
    excluded = sorted(other_bases(base_of, study.base), key=list(base_of).index)
    if excluded:
        yield Finding("different-base", {"base": study.base.name, "excluded": excluded})
    elif name := strange_name(base_of, study.base):
        yield Finding("base-name-differs", {"named": name, "given": study.base.name})


def quantized_base(study: Study) -> Iterator[Finding]:
    """Report how far rounding moved a quantized W, and how many enrichments that could explain."""
    table = study.amplifications
    rounded = table[(table["storage"] != "") & table["at_rank"]] if len(table) else table
    if rounded.empty:
        return
    storages = sorted(set(rounded["storage"]))
    noise = rounded["noise"].dropna()
    if noise.empty:
        yield Finding("quantized-base-error-unknown", {"storages": storages})
        return
    yield Finding(
        "quantized-base",
        {
            "storages": storages,
            "noise": float(noise.median()),
            "largest_noise": float(noise.max()),
            "buried": int((rounded["enrichment"] < 2 * rounded["noise"]).sum()),
            "total": len(rounded),
        },
    )


def amplifications(study: Study) -> Iterator[Finding]:
    """Report how strongly each rank amplifies W, next to what random directions would score."""
    table = study.amplifications
    if table.empty:
        return
    ranks = study.spectra[["adapter", "module", "rank"]]
    table = _tasks_of_all_ranks(study, table.merge(ranks, on=["adapter", "module"]))
    full = table[table["at_rank"]]
    names = ["amplification_factor", "chance_factor", "enrichment"]
    yield Finding("amplification", {"ranks": _medians_by_rank(full, names)})
    if full["rank"].nunique() > 1:
        k = int(full["k"].min())
        equal = _medians_by_rank(table[table["k"] == k], ["enrichment"])
        yield Finding("amplification-at-equal-k", {"k": k, "ranks": equal})


def _tasks_of_all_ranks(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of tasks that were trained at every rank, so that ranks alone differ."""
    tasks = table["adapter"].map(study.runs.set_index("adapter")["task"])
    if tasks.isna().any():
        return table
    common = set.intersection(*(set(of_rank) for _, of_rank in tasks.groupby(table["rank"])))
    return table[tasks.isin(common)] if common else table


def _medians_by_rank(table: pd.DataFrame, names: list[str]) -> list[dict[str, float]]:
    medians = table.groupby("rank")[names].median()
    return [
        {"rank": int(rank), **{name: float(row[name]) for name in names}}
        for rank, row in medians.iterrows()
    ]


def accuracies(study: Study) -> Iterator[Finding]:
    """Report the accuracy of the adapters on held-out data."""
    if "metric_accuracy" not in study.runs:
        return
    groups = []
    for (task, rank), rows in study.runs.groupby(["task", "rank"]):
        before = rows.get("metric_base_accuracy")
        unknown = before is None or before.isna().all()
        groups.append(
            {
                "task": str(task),
                "rank": int(rank),
                "before": None if unknown else float(before.median()),
                "after": float(rows["metric_accuracy"].median()),
            }
        )
    yield Finding("accuracy", {"groups": groups})
