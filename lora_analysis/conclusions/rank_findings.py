"""What the spectra say about ranks, over the same tasks at every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_analysis.finding import Finding
from lora_analysis.studies.pair_classes import Exclusion

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study


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


def directions_by_energy(study: Study) -> Iterator[Finding]:
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
