"""Tables of a report about its adapters, modules and base weights, as short texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import bases_of, several_bases
from lora_analysis.text import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_analysis.studies import Study


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table as text; the first ``text_columns`` columns are left-aligned."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


def cell(value: Any) -> str:
    """Return a value as text for a table; a dash if it is missing."""
    if isinstance(value, float | np.floating):
        figure = float(value)
        if (2 * figure).is_integer() and abs(figure) < 1e6:  # a count, or a median of counts
            return f"{figure:.10g}"
        return number(figure)
    return "–" if value is None else str(value)


def _percent(value: float) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "–"


def _rows(table: pd.DataFrame) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell(value) for value in row) for row in table.itertuples(index=False))


def adapters_table(study: Study) -> ReportTable:
    """Return the analyzed adapters, one per row."""
    runs = study.runs
    facts = [name for name in ("task", "rank", "seed", "step") if runs[name].notna().any()]
    columns = {
        "adapter": runs["adapter"],
        **{name: runs[name] for name in facts},
        "format": runs["format"],
        "modules": runs["modules"],
        "untrained": runs["modules"] - runs["trained_modules"],
        "‖ΔW‖": runs["norm"].where(runs["scale_known"]),
    }
    if "metric_accuracy" in runs:
        columns["accuracy"] = runs["metric_accuracy"].map(_percent)
    table = pd.DataFrame(columns)
    caption = "‖ΔW‖: Frobenius norm over all modules, scale included; –: unknown."
    return ReportTable("adapters", caption, tuple(columns), _rows(table), 1 + len(facts[:1]))


def accuracy_table(study: Study) -> ReportTable | None:
    """Return accuracy by task, rank and seed, like the paper's Table 6; None without metrics."""
    runs = study.runs
    if "metric_accuracy" not in runs or runs[["task", "rank", "seed"]].isna().any(axis=None):
        return None
    pivot = runs.pivot_table(index=["task", "rank"], columns="seed", values="metric_accuracy")
    rows = []
    for (task, rank), values in pivot.iterrows():
        before = runs[runs["task"] == task].get("metric_base_accuracy", pd.Series(dtype=float))
        cells = [_percent(v) for v in (before.median(), *values)]
        rows.append((str(task), str(int(rank)), *cells))
    columns = ("task", "rank", "base", *(f"seed {int(seed)}" for seed in pivot.columns))
    alphas = study.spectra["alpha"].dropna().unique()
    fixed = f" α is {alphas[0]:g} at every rank." if len(alphas) == 1 else ""
    caption = (
        f"Accuracy on held-out data before (base) and after training, by rank and seed.{fixed}"
    )
    return ReportTable("accuracy", caption, columns, tuple(rows))


def amplification_table(study: Study, modules: Sequence[str]) -> ReportTable | None:
    """Return the paper's Table 7 for a few modules, and the medians over all of them."""
    table = study.amplifications
    if table.empty:
        return None
    ranks = study.spectra.groupby("adapter")["rank"].max()
    full = table[table["at_rank"]].assign(rank=lambda t: t["adapter"].map(ranks))
    groups = [(name, full[full["module"] == name]) for name in modules]
    groups.append(("all modules", full))
    columns = ("module", "rank", "adapters", "‖UᵀWV‖ ΔW's", "W's", "random", "‖ΔW‖", "‖W‖",
               "factor", "random factor", "enrichment")  # fmt: skip
    values = ("projected", "projected_weight", "projected_random", "delta_norm", "weight_norm",
              "amplification_factor", "chance_factor", "enrichment")  # fmt: skip
    rows = [
        (
            str(name),
            str(rank),
            str(rows_of_rank["adapter"].nunique()),
            *(cell(float(rows_of_rank[value].median())) for value in values),
        )
        for name, group in groups
        for rank, rows_of_rank in group.groupby("rank")
    ]
    caption = (
        "Medians over adapters, at full rank. ‖UᵀWV‖ with the top-r directions of ΔW, of W itself "
        "and random ones (exact root mean square); factor: ‖ΔW‖/‖UᵀWV‖; random factor: the same "
        "for random directions; enrichment: the ratio of the two, module by module (medians of "
        "ratios are not ratios of medians)."
    )
    return ReportTable("amplification", caption, columns, tuple(rows))


def spectra_table(study: Study) -> ReportTable:
    """Return medians over modules of the ranks derived from each adapter's spectra."""
    values = {
        "numerical_rank": "numerical rank",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
        "energy_rank_90": "90 % of energy",
        "energy_rank_99": "99 % of energy",
    }
    medians = study.spectra.groupby("adapter", sort=False)[["rank", *values]].median()
    columns = ("adapter", "rank", *values.values())
    caption = "Medians over modules. 90 % of energy: number of directions that hold 90 % of ‖ΔW‖²."
    return ReportTable("spectra", caption, columns, _rows(medians.reset_index()))


def module_types_table(study: Study) -> ReportTable | None:
    """Return medians by base and module type: ranks, overlap of pairs, amplification."""
    spectra = study.spectra[study.spectra["numerical_rank"] > 0]
    if spectra.empty:
        return None
    keys = ["base", "module_type"]
    spectra = spectra.assign(base=bases_of(study, spectra["adapter"]))
    table = spectra.groupby(keys, sort=False).agg(
        modules=("module", "nunique"),
        stable_rank=("stable_rank", "median"),
        energy_rank_90=("energy_rank_90", "median"),
    )
    names = {"stable_rank": "stable rank", "energy_rank_90": "90 % of energy"}
    rows = study.similarities
    rows = rows[
        (rows["initialization"] != InitRelation.SAME_RUN)
        & ~rows["relation"].isin([Relation.OTHER_TASK, Relation.SAME_RUN, Relation.EARLIER])
    ]
    rows = rows.assign(base=bases_of(study, rows["a"]))
    for side in ("output", "input"):
        of_side = rows[(rows["side"] == side) & ~(rows["shared_init"] & (side == "input"))]
        for value, name in (("phi_1_1", "φ(1,1)"), ("omega", "ω")):
            if len(of_side):
                table[value + side] = of_side.groupby(keys)[value].median()
                names[value + side] = f"{name} {side}"
    full = study.amplifications
    if len(full):
        full = full[full["at_rank"]]
        full = full.assign(base=bases_of(study, full["adapter"])).groupby(keys)
        table["enrichment"] = full["enrichment"].median()
        table["relative"] = full["relative_norm"].median()
        names["relative"] = "‖ΔW‖/‖W‖"
    table = table.rename(columns=names).reset_index()
    several = several_bases(study)
    if not several:
        del table["base"]
    table = table.rename(columns={"module_type": "module type"})
    caption = (
        "Medians over modules and adapters, and over pairs that are neither reference pairs nor "
        "one run; modules with a shared initialization are excluded on the input side."
    )
    return ReportTable("types", caption, tuple(table.columns), _rows(table), 1 + several)
