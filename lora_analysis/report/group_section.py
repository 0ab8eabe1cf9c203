"""What a report shows of a group of eight or more adapters: one sentence, one figure, one table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis import plots
from lora_analysis.errors import InputError
from lora_analysis.finding import Finding
from lora_analysis.report.similarity_figures import ReportFigure
from lora_analysis.report.tables import ReportTable
from lora_analysis.studies.group_shares import PARTS
from lora_analysis.studies.similarity_matrix import ALL
from lora_analysis.text import number, overlap_number

if TYPE_CHECKING:
    from lora_analysis.progress import Progress
    from lora_analysis.studies import GroupAnalysis, Study

FEWEST: Final = 8
# Modules of each type: a report does not take much longer for its group.
_MODULES_PER_TYPE: Final = 4
# Joint directions of more vectors take minutes per module.
_MAX_DIRECTIONS: Final = 4096
_COLUMNS: Final = {
    "mean": "mean",
    "matrices_beyond_mean": "matrices beyond",
    "directions": "both sides",
    "output": "output side",
    "input": "input side",
}


def report_group(
    study: Study, *, progress: Progress | None = None
) -> tuple[GroupAnalysis | None, Finding | None]:
    """Return the group analysis of a report, and its finding; None for fewer than eight adapters.

    The group are the adapters of the largest task, if it has eight: one adapter of each other task
    is then a null. Else all analyzed adapters are the group.
    """
    runs = study.runs[~study.runs["adapter"].isin(study.reference)]
    if len(runs) < FEWEST:
        return None, None
    counts = runs["task"].value_counts()
    of_task = runs["task"] == counts.index[0] if len(counts) else np.zeros(len(runs), dtype=bool)
    members = runs[of_task] if of_task.sum() >= FEWEST else runs
    ranks = study.spectra[study.spectra["adapter"].isin(members["adapter"])]
    directions = ranks.groupby("module")["numerical_rank"].sum().max()
    if directions > _MAX_DIRECTIONS:
        reason = (
            f"the updates of one module have {int(directions)} directions, and a report takes up "
            f"to {_MAX_DIRECTIONS}. Call Study.group_analysis on fewer modules."
        )
        return None, Finding("group-not-analyzed", {"reason": reason})
    try:
        analysis = study.group_analysis(
            list(members["adapter"]), modules_per_type=_MODULES_PER_TYPE, progress=progress
        )
    except InputError as error:
        return None, Finding("group-not-analyzed", {"reason": str(error)})
    return analysis, analysis.finding


def group_table(analysis: GroupAnalysis | None) -> ReportTable | None:
    """Return one row per type of module: shares with their random baselines in parentheses."""
    if analysis is None:
        return None
    rows = []
    table = analysis.to_frame()
    for kind in dict.fromkeys(table["module_type"]):
        of_kind = table[table["module_type"] == kind].set_index("part")
        shares = [
            f"{overlap_number(row.share)} ({number(row.chance)})"
            + (f", others {overlap_number(row.others)}" if analysis.others else "")
            for row in (of_kind.loc[part] for part in _COLUMNS)
        ]
        first = of_kind.iloc[0]
        name = "all modules" if kind == ALL else str(kind)
        rows.append((name, str(int(first["modules"])), overlap_number(first["rho"]), *shares))
    others = "; others: the largest share among adapters of other groups" if analysis.others else ""
    caption = (
        "Share of the energy of an adapter that the others hold: their mean (signed), "
        f"{analysis.k} matrices beyond it, and their joint {analysis.k} directions. In "
        f"parentheses: random directions of the same spectra{others}. ρ: mean cosine of two "
        "adapters. Rows of single types are no tests."
    )
    return ReportTable("group", caption, ("type", "modules", "ρ", *_COLUMNS.values()), tuple(rows))


def group_figures(analysis: GroupAnalysis | None, _study: Study) -> Iterator[ReportFigure]:
    """Yield the shares over the number of adapters in a basis; nothing without an analysis."""
    if analysis is None:
        return
    drawn = {part: analysis.shares[PARTS.index(part)] for part in ("mean", "directions")}
    ends = "; ".join(
        f"{part}: {number(shares[0])} to {number(shares[-1])}" for part, shares in drawn.items()
    )
    others = "Colored: adapters of other groups, smallest to largest. " if analysis.others else ""
    yield ReportFigure(
        name="group",
        title="Energy that other adapters of the group hold.",
        caption=(
            "Share of the energy of an adapter outside a basis of that many others, held by their "
            f"mean and by their joint {analysis.k} directions. Gray: random directions. "
            f"{others}Dotted: the mean as it follows from ρ."
        ),
        alt=f"Shares over the number of adapters, from {analysis.sizes[0]} to "
        f"{analysis.sizes[-1]}. {ends}.",
        figure=plots.plot_group(analysis, plots.new_axes()).figure,  # type: ignore[arg-type]
    )
