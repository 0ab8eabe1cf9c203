"""Sentences about single adapters against W, their spectra and their accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_analysis.findings.levels import Finding, number
from lora_analysis.studies import Study

if TYPE_CHECKING:
    import pandas as pd


def amplified(study: Study) -> Iterator[Finding]:
    """Say how strongly each rank amplifies W, beside what chance would score."""
    table = study.amplifications
    if table.empty:
        return
    ranks = study.spectra[["adapter", "module", "rank"]]
    full = table[table["at_rank"]].merge(ranks, on=["adapter", "module"])
    names = ("amplification_factor", "chance_factor", "enrichment")
    medians = full.groupby("rank")[list(names)].median()
    factor, by_chance, rich = (_by_rank(medians[name]) for name in names)
    text = (
        f"Along its own directions ΔW is {factor} times as strong as W (amplification factor, "
        f"medians over modules). Random directions of the same size would score {by_chance}: W "
        f"already holds {rich} times as much along ΔW's directions as along random ones "
        "(enrichment)."
    )
    values = {
        f"{name}_rank_{rank}": float(v) for name in names for rank, v in medians[name].items()
    }
    yield Finding("result", "amplification", text, values)
    if full["rank"].nunique() > 1:
        text = (
            "Part of the fall of factor and enrichment with rank is A's initial noise, of which a "
            "larger rank keeps more: it does not show that larger ranks learn something else."
        )
        yield Finding("limit", "amplification", text)


def _by_rank(medians: pd.Series) -> str:
    """Return "9.7 (rank 4), 4.4 (rank 8)", or the number alone where there is one rank."""
    if len(medians) == 1:
        return number(float(medians.iloc[0]))
    return ", ".join(f"{number(float(v))} (rank {int(rank)})" for rank, v in medians.items())


def energy(study: Study) -> Iterator[Finding]:
    """Say how many directions hold most of each update."""
    own = ~study.spectra["adapter"].isin(study.reference)
    trained = study.spectra[own & (study.spectra["numerical_rank"] > 0)]
    if trained.empty:
        return
    parts = []
    for rank, rows in trained.groupby("rank"):
        low, median, high = rows["energy_rank_90"].quantile([0.25, 0.5, 0.75])
        parts.append(f"rank {int(rank)}: {median:.0f} ({low:.0f} to {high:.0f})")
    text = (
        f"Directions that hold 90 % of ‖ΔW‖², median over modules (quartiles) — {'; '.join(parts)}."
    )
    yield Finding("result", "directions needed", text)


def accuracy(study: Study) -> Iterator[Finding]:
    """Say what the adapters are worth on held-out data."""
    if "metric_accuracy" not in study.runs:
        return
    parts = []
    for (task, rank), rows in study.runs.groupby(["task", "rank"]):
        start = rows.get("metric_base_accuracy")
        before = "" if start is None or start.isna().all() else f" from {start.median():.0%}"
        parts.append(f"{task} rank {int(rank)}{before} to {rows['metric_accuracy'].median():.0%}")
    yield Finding("result", "accuracy", f"Accuracy on held-out data: {'; '.join(parts)}.")
