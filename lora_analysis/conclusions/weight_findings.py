"""Findings about single adapters: next to W, what their spectra say about ranks, accuracy.

Ranks are compared over the tasks that were trained at every rank, so that only ranks differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.adapter import is_fine_tune
from lora_analysis.amplify import RunEnrichment, run_enrichments
from lora_analysis.amplify.controls import FEWEST_CROSSED, SIGNIFICANT
from lora_analysis.finding import Finding
from lora_analysis.studies import Study
from lora_analysis.studies.base_models import differing_base_name, other_bases
from lora_analysis.studies.pair_classes import Exclusion

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study


def report_base_notes(study: Study, *, damage: bool) -> Iterator[Finding]:
    """Report what is wrong with the numbers of the base, or what else was noticed about it."""
    for finding in study.base_findings():
        if (finding.severity == "damage") == damage:
            yield finding


def report_missing_weights(study: Study) -> Iterator[Finding]:
    """Report modules without a weight in the base."""
    if study.unmatched:
        module, reason = next(iter(study.unmatched.items()))
        fields = {"count": len(study.unmatched), "module": module, "reason": reason}
        yield Finding("no-base-weight", fields)


def report_different_base(study: Study) -> Iterator[Finding]:
    """Report adapters of another base than the given one, or a base that may be another model."""
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
    elif name := differing_base_name(base_of, study.base):
        yield Finding("base-name-differs", {"named": name, "given": study.base.name})


def report_quantized_base(study: Study) -> Iterator[Finding]:
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


def report_amplifications(study: Study) -> Iterator[Finding]:
    """Report how strongly each rank amplifies W, next to what random directions would score."""
    table = tasks_of_all_ranks(study, with_ranks(study))[0]
    if table.empty:
        return
    full = table[table["at_rank"]]
    names = ["amplification_factor", "chance_factor", "enrichment"]
    ranks = _medians_by_rank(full, names)
    yield Finding("amplification", {"ranks": ranks})
    if len(ranks) > 1:
        k = int(full["k"].min())
        equal = _medians_by_rank(table[table["k"] == k], ["enrichment"])
        fields = {
            "low": ranks[0]["rank"],
            "high": ranks[-1]["rank"],
            "enrichments": [row["enrichment"] for row in ranks],
            "k": k,
            "equal": [row["enrichment"] for row in equal],
            "ranks": equal,
        }
        yield Finding("amplification-at-equal-k", fields)


def report_enrichment_controls(study: Study) -> Iterator[Finding]:
    """Report if an enrichment is specific to its run, next to both of its controls."""
    table = with_ranks(study)
    if table.empty:
        return
    full = table[table["at_rank"]]
    rank_of = full.groupby("adapter")["rank"].max()
    runs = [run for run in run_enrichments(study.amplified()) if run.label in rank_of]
    ranks = _enrichments_by_rank(tasks_of_all_ranks(study, full)[0], runs)
    # The enrichments that directions through W reach.
    reached = [
        enrichment
        for row in ranks
        if (enrichment := row["enrichment"]) is not None
        and (through := row["enrichment_through_weight"]) is not None
        and through >= enrichment
    ]
    fields: dict[str, Any] = {
        "ranks": ranks,
        "geometry": [min(reached), max(reached)] if len(reached) == len(ranks) else None,
        "needed": FEWEST_CROSSED,
        "runs": [_run_fields(run, int(rank_of[run.label])) for run in runs],
    }
    tested = [run for run in runs if run.testable]
    if not tested:
        values = max((len(run.crossed) for run in runs), default=0)
        yield Finding("enrichment-untested", {**fields, "values": values, "untested": 0})
        return
    fields |= {"tested": len(tested), "untested": len(runs) - len(tested)}
    specific = [run.label for run in tested if run.specific]
    if specific:
        expected = SIGNIFICANT * len(tested)
        fields |= {"specific": len(specific), "adapters": specific, "expected": expected}
        yield Finding("enrichment-specific", fields)
    else:
        p = min(run.p for run in tested)
        yield Finding("enrichment-not-specific", {**fields, "p": p})


def _enrichments_by_rank(
    table: pd.DataFrame, runs: Sequence[RunEnrichment]
) -> list[dict[str, float | None]]:
    """Return the median enrichment and its controls by rank, with the range of crossed values."""
    names = ["enrichment", "enrichment_crossed", "enrichment_through_weight"]
    ranks: list[dict[str, float | None]] = []
    for medians in _medians_by_rank(table, names):
        labels = set(table.loc[table["rank"] == medians["rank"], "adapter"])
        crossed = [value for run in runs if run.label in labels for value in run.crossed]
        ranks.append(
            {
                **{name: _defined(value) for name, value in medians.items()},
                "low": min(crossed, default=None),
                "high": max(crossed, default=None),
            }
        )
    return ranks


def _run_fields(run: RunEnrichment, rank: int) -> dict[str, float | str | None]:
    low, high = run.range_crossed
    return {
        "adapter": run.label,
        "rank": rank,
        "enrichment": _defined(run.enrichment),
        "enrichment_matched": _defined(run.median_matched),  # at the k of the crossed values
        "crossed": _defined(run.median_crossed),
        "low": _defined(low),
        "high": _defined(high),
        "values": len(run.crossed),
        "p": _defined(run.p),
        "through_weight": _defined(run.through_weight),
    }


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def with_ranks(study: Study) -> pd.DataFrame:
    """Return the amplifications with the rank of each update, without earlier checkpoints.

    A full fine-tune has no rank: it is left out next to adapters, else the number of directions
    that were compared stands for it.
    """
    table = study.amplifications
    if table.empty:
        return table
    earlier = study.runs.loc[study.runs["earlier"].astype(bool), "adapter"]
    table = table[~table["adapter"].isin(earlier)]
    table = table.merge(study.spectra[["adapter", "module", "rank"]], on=["adapter", "module"])
    is_full = table["adapter"].isin(
        [label for label, adapter in study.adapters.items() if is_fine_tune(adapter)]
    )
    if not is_full.all():
        return table[~is_full]
    compared = table.groupby(["adapter", "module"])["k"].transform("max")
    return table.assign(rank=compared)


def _medians_by_rank(table: pd.DataFrame, names: list[str]) -> list[dict[str, float]]:
    medians = table.groupby("rank")[names].median()
    return [
        {"rank": int(rank), **{name: float(row[name]) for name in names}}
        for rank, row in medians.iterrows()
    ]


def report_accuracies(study: Study) -> Iterator[Finding]:
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


@dataclass(frozen=True, slots=True)
class RankSpectra:
    """Medians over the modules and adapters of one rank.

    Attributes
    ----------
    rank, adapters
        The rank, and the number of adapters.
    numerical_rank, effective_rank, stable_rank, energy_rank_99
        Medians.
    energy_rank_90
        First quartile, median and third quartile of the number of directions that hold 90 % of
        ‖ΔW‖².
    """

    rank: int
    adapters: int
    numerical_rank: float
    effective_rank: float
    stable_rank: float
    energy_rank_90: tuple[float, float, float]
    energy_rank_99: float


def tasks_of_all_ranks(study: Study, table: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the rows of tasks that were trained at every rank, so that only ranks differ.

    Parameters
    ----------
    table
        A table with the columns ``adapter`` and ``rank``.

    Returns
    -------
    table, tasks
        All rows and no task if a task is unknown, or none was trained at every rank.
    """
    if table.empty:
        return table, ()
    tasks = table["adapter"].map(study.runs.set_index("adapter")["task"])
    if tasks.isna().any():
        return table, ()
    common = set.intersection(*(set(of_rank) for _, of_rank in tasks.groupby(table["rank"])))
    return (table[tasks.isin(common)], tuple(sorted(common))) if common else (table, ())


def spectra_by_rank(study: Study) -> tuple[tuple[RankSpectra, ...], tuple[str, ...]]:
    """Return the spectra by rank, ascending, and the tasks behind them (all if empty).

    Untrained modules, references, earlier checkpoints and repeated copies are left out.
    """
    excluded = study.runs.loc[
        study.runs["excluded"].isin([Exclusion.EARLIER, Exclusion.ONE_SAMPLE]), "adapter"
    ]
    rows = study.spectra[
        ~study.spectra["adapter"].isin({*excluded, *study.reference})
        & (study.spectra["numerical_rank"] > 0)
    ]
    if rows.empty:
        return (), ()
    rows, tasks = tasks_of_all_ranks(study, rows)
    result = []
    for rank, of_rank in rows.groupby("rank"):
        low, median, high = of_rank["energy_rank_90"].quantile([0.25, 0.5, 0.75])
        result.append(
            RankSpectra(
                rank=int(rank),
                adapters=of_rank["adapter"].nunique(),
                numerical_rank=float(of_rank["numerical_rank"].median()),
                effective_rank=float(of_rank["effective_rank"].median()),
                stable_rank=float(of_rank["stable_rank"].median()),
                energy_rank_90=(float(low), float(median), float(high)),
                energy_rank_99=float(of_rank["energy_rank_99"].median()),
            )
        )
    return tuple(result), tasks


def report_directions_by_energy(study: Study) -> Iterator[Finding]:
    """Report how many directions hold 90 % of the energy of each update."""
    by_rank, tasks = spectra_by_rank(study)
    if by_rank:
        ranks = []
        for spectra in by_rank:
            low, median, high = spectra.energy_rank_90
            ranks.append({"rank": spectra.rank, "low": low, "median": median, "high": high})
        yield Finding(
            "directions-by-energy",
            {"tasks": list(tasks) if len(by_rank) > 1 and tasks else None, "ranks": ranks},
        )
