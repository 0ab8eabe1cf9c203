"""The tables of a report: short ones for its pages, whole ones as CSV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lora_analysis.conclusions import number
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import bases_of, several_bases
from lora_analysis.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    from lora_analysis.studies import Study


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table as shown: texts in rows, the first ``text_columns`` left-aligned."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


def cell(value: Any) -> str:
    """Return a value as a table shows it; a dash where there is none."""
    if isinstance(value, float | np.floating):
        figure = float(value)
        return str(int(figure)) if figure.is_integer() and abs(figure) < 1e6 else number(figure)
    return "–" if value is None else str(value)


def _percent(value: float) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "–"


def _rows(table: pd.DataFrame) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell(value) for value in row) for row in table.itertuples(index=False))


def adapters_table(study: Study) -> ReportTable:
    """Return what was analyzed, one adapter a row."""
    runs = study.runs
    known = [c for c in ("task", "rank", "seed", "step") if runs[c].notna().any()]
    columns = {
        "adapter": runs["adapter"],
        **{c: runs[c] for c in known},
        "format": runs["format"],
        "modules": runs["modules"],
        "untrained": runs["modules"] - runs["trained_modules"],
        "‖ΔW‖": runs["norm"].where(runs["scale_known"]),
    }
    if "metric_accuracy" in runs:
        columns["accuracy"] = runs["metric_accuracy"].map(_percent)
    table = pd.DataFrame(columns)
    caption = "‖ΔW‖: Frobenius norm over all modules, scale included; – where it is not known."
    return ReportTable("adapters", caption, tuple(columns), _rows(table), 1 + len(known[:1]))


def accuracy_table(study: Study) -> ReportTable | None:
    """Return accuracy by task, rank and seed, as the paper's Table 6; None without metrics."""
    runs = study.runs
    if "metric_accuracy" not in runs or runs[["task", "rank", "seed"]].isna().any(axis=None):
        return None
    shown = runs.pivot_table(index=["task", "rank"], columns="seed", values="metric_accuracy")
    rows = []
    for (task, rank), values in shown.iterrows():
        before = runs[runs["task"] == task].get("metric_base_accuracy", pd.Series(dtype=float))
        cells = [_percent(v) for v in (before.median(), *values)]
        rows.append((str(task), str(int(rank)), *cells))
    columns = ("task", "rank", "base", *(f"seed {int(seed)}" for seed in shown.columns))
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
               "factor", "chance", "enrichment")  # fmt: skip
    values = ("projected", "projected_weight", "projected_random", "delta_norm", "weight_norm",
              "amplification_factor", "chance_factor", "enrichment")  # fmt: skip
    rows = [
        (
            str(name),
            str(rank),
            str(own["adapter"].nunique()),
            *(cell(float(own[value].median())) for value in values),
        )
        for name, group in groups
        for rank, own in group.groupby("rank")
    ]
    caption = (
        "Medians over adapters, at full rank. ‖UᵀWV‖ with the top-r directions of ΔW, of W itself "
        "and random ones (exact root mean square); factor = ‖ΔW‖/‖UᵀWV‖; chance: what random "
        "directions would score; enrichment: the ratio of the two, module by module (medians of "
        "ratios are not ratios of medians)."
    )
    return ReportTable("amplification", caption, columns, tuple(rows))


def spectra_table(study: Study) -> ReportTable:
    """Return medians over modules of the ranks read from each adapter's spectra."""
    values = {
        "numerical_rank": "numerical rank",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
        "energy_rank_90": "90 % of energy",
        "energy_rank_99": "99 % of energy",
    }
    medians = study.spectra.groupby("adapter", sort=False)[["rank", *values]].median()
    columns = ("adapter", "rank", *values.values())
    caption = "Medians over modules. Energy: how many directions hold that share of ‖ΔW‖²."
    return ReportTable("spectra", caption, columns, _rows(medians.reset_index()))


def kinds_table(study: Study) -> ReportTable | None:
    """Return medians by base and type of module: how alike, how many directions, against W."""
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
        & ~rows["relation"].isin([Relation.REFERENCE, Relation.SAME_RUN, Relation.EARLIER])
    ]
    rows = rows.assign(base=bases_of(study, rows["a"]))
    for side in ("output", "input"):
        own = rows[(rows["side"] == side) & ~(rows["shared_init"] & (side == "input"))]
        for value, name in (("phi_1_1", "φ(1,1)"), ("omega", "ω")):
            if len(own):
                table[value + side] = own.groupby(keys)[value].median()
                names[value + side] = f"{name} {side[:-3]}"
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
    table = table.rename(columns={"module_type": "type of module"})
    caption = (
        "Medians over modules and adapters, and over pairs that are no reference nor one run; "
        "shared starts left out on the input side."
    )
    return ReportTable("types", caption, tuple(table.columns), _rows(table), 1 + several)


# A spreadsheet takes the wide ones for the same.
_CELLS_AT_ONCE = 2**18
_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV; text that a spreadsheet would run as a formula is quoted.

    One row is one line: what does not print, line ends too, is shown by its code.
    """
    return str(table.map(_safe).to_csv(index=False, header=[_safe(one) for one in table.columns]))


def write_square_csv(table: pd.DataFrame, stream: BinaryIO) -> None:
    """Write a `square_table` as `csv_text` does, some rows at a time."""
    rows = max(1, _CELLS_AT_ONCE // len(table.columns))
    for first in range(0, len(table), rows):
        part = table.iloc[first : first + rows].copy()
        part.isetitem(0, part.iloc[:, 0].map(_safe))
        header = [_safe(one) for one in table.columns] if first == 0 else False
        stream.write(part.to_csv(index=False, header=header).encode())


def _safe(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    line = printable(value)
    return f"'{line}" if line.startswith(_FORMULA_STARTS) else line


def square_table(labels: Sequence[str], values: NDArray[np.float64]) -> pd.DataFrame:
    """Return a matrix over adapters as a table, their names in the first column and the head."""
    table = pd.DataFrame(values, columns=list(labels))
    table.insert(0, "adapter", list(labels), allow_duplicates=True)
    return table
