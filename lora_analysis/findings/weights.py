"""Sentences about single adapters against W, their spectra and their accuracy."""

from __future__ import annotations

from collections.abc import Iterator

from lora_analysis.findings.levels import Finding, number, plural
from lora_analysis.studies import Study


def amplified(study: Study) -> Iterator[Finding]:
    """Say how strongly each rank amplifies W, beside what chance would score."""
    table = study.amplifications
    if table.empty:
        return
    full = table[table["at_rank"]].merge(study.runs[["adapter", "rank"]], on="adapter")
    for rank, rows in full.groupby("rank"):
        factor, by_chance, rich = (
            rows[name].quantile([0.25, 0.5, 0.75]).to_list()
            for name in ("amplification_factor", "chance_factor", "enrichment")
        )
        text = (
            f"At rank {int(rank)} ΔW is {number(factor[1])} times as strong as W along ΔW's own "
            f"directions (amplification factor, median over {plural(len(rows), 'module')} of "
            f"{plural(rows['adapter'].nunique(), 'adapter')}; quartiles {number(factor[0])} to "
            f"{number(factor[2])}). Random directions would score {number(by_chance[1])}: W holds "
            f"{number(rich[1])} times as much along ΔW's directions as along random ones "
            "(enrichment)."
        )
        values = {
            "rank": int(rank),
            "amplification_factor": factor[1],
            "chance_factor": by_chance[1],
            "enrichment": rich[1],
        }
        yield Finding("result", "amplification", text, values)
    if full["rank"].nunique() > 1:
        text = (
            "Part of the fall of factor and enrichment with rank is A's initial noise, which a "
            "larger rank keeps more of; it is no sign that larger ranks learn something else."
        )
        yield Finding("limit", "amplification", text)


def energy(study: Study) -> Iterator[Finding]:
    """Say how many directions hold most of each update."""
    trained = study.spectra[study.spectra["numerical_rank"] > 0]
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
