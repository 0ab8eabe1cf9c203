"""Sentences about single adapters against W, their spectra and their accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_analysis.conclusions.levels import Finding, Kind, number
from lora_analysis.conclusions.runs import some
from lora_analysis.studies import Study
from lora_analysis.studies.base_models import other_bases, strange_name

if TYPE_CHECKING:
    import pandas as pd


def damaged_base(study: Study) -> Iterator[Finding]:
    """Pass on what is wrong with the base's numbers."""
    for one in _of_the_base(study):
        if one.kind == "damage":
            yield one


def unusual_base(study: Study) -> Iterator[Finding]:
    """Pass on what else was noticed about the base."""
    yield from (one for one in _of_the_base(study) if one.kind != "damage")


def _of_the_base(study: Study) -> Iterator[Finding]:
    for one in study.base_findings():
        kind: Kind = "damage" if one.severity == "damage" else "limit"
        scalar = (float, int, str)
        values = {key: value for key, value in one.fields.items() if isinstance(value, scalar)}
        yield Finding(kind, "base", one.text, values, code=one.code)


def other_base(study: Study) -> Iterator[Finding]:
    """Say which adapters are not held against the base, and where it may be another model."""
    runs = study.runs[~study.runs["adapter"].isin(study.reference)]
    named = {
        label: name if isinstance(name, str) else None
        for label, name in zip(runs["adapter"], runs["base_model"], strict=True)
    }
    base = study.base
    if base is None:
        return
    left = sorted(other_bases(named, base), key=list(named).index)
    if left:
        text = (
            f"{some(left)} {'names' if len(left) == 1 else 'name'} another base than {base.name}: "
            "not held against it."
        )
        yield Finding("limit", "other base", text, {"adapters": len(left)})
    elif name := strange_name(named, base):
        text = (
            f"The adapters name {name} as their base; the one they are held against is called "
            f"{base.name}. If these are two models (versions of one have the same shapes), what is "
            "measured against W means nothing."
        )
        yield Finding("limit", "other base", text, {"named": name, "given": base.name})


def amplified(study: Study) -> Iterator[Finding]:
    """Say how strongly each rank amplifies W, beside what chance would score."""
    table = study.amplifications
    if table.empty:
        return
    ranks = study.spectra[["adapter", "module", "rank"]]
    table = _tasks_of_all_ranks(study, table.merge(ranks, on=["adapter", "module"]))
    names = ["amplification_factor", "chance_factor", "enrichment"]
    medians = table[table["at_rank"]].groupby("rank")[names].median()
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
    if len(medians) > 1:
        yield _at_equal_k(table)


def _tasks_of_all_ranks(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of tasks that were trained at every rank, so that ranks alone differ."""
    tasks = table["adapter"].map(study.runs.set_index("adapter")["task"])
    if tasks.isna().any():
        return table
    common = set.intersection(*(set(own) for _, own in tasks.groupby(table["rank"])))
    return table[tasks.isin(common)] if common else table


def _at_equal_k(table: pd.DataFrame) -> Finding:
    """Compare the ranks at the same number of directions, which full rank does not."""
    k = int(table.loc[table["at_rank"], "k"].min())
    rich = table[table["k"] == k].groupby("rank")["enrichment"].median()
    text = (
        "Factor and enrichment at full rank fall with the rank because a larger rank counts more "
        f"and weaker directions, A's initial noise among them. At the same {k} directions the "
        f"enrichment is {_by_rank(rich)}."
    )
    values = {f"enrichment_k{k}_rank_{rank}": float(v) for rank, v in rich.items()}
    return Finding("result", "amplification", text, values)


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


def quantized(study: Study) -> Iterator[Finding]:
    """Say how far rounding has moved a quantized W, and below which enrichment that is all."""
    table = study.amplifications
    rounded = table[(table["storage"] != "") & table["at_rank"]] if len(table) else table
    if rounded.empty:
        return
    storages = sorted(set(rounded["storage"]))
    noise = rounded["noise"].dropna()
    text = (
        f"W is quantized ({', '.join(storages)}): what is measured against it is measured against "
        "the rounded weight. "
    )
    if noise.empty:
        text += "How far rounding moved it is not known for this storage."
        yield Finding("limit", "quantized base", text, {"noise": None})
        return
    worst = float(noise.max())
    buried = int((rounded["enrichment"] < 2 * rounded["noise"]).sum())
    text += (
        f"The expected error is {number(float(noise.median()))} of ‖W‖ (median over modules; "
        f"largest {number(worst)}) and as unaligned with ΔW as chance, so it alone gives an "
        f"enrichment of that size. {buried} of {len(rounded)} enrichments are below twice theirs."
    )
    values = {"noise": float(noise.median()), "largest_noise": worst, "buried": buried}
    yield Finding("limit", "quantized base", text, values)
