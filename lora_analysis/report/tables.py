"""Tables of a report about its adapters, modules and base weights, as short texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lora_analysis.adapter import is_fine_tune
from lora_analysis.blocks import group_modules, is_image
from lora_analysis.conclusions.comparison_values import SIDES_IN_ORDER
from lora_analysis.conclusions.weight_findings import (
    spectra_by_rank,
    tasks_of_all_ranks,
    with_ranks,
)
from lora_analysis.report.representatives import (
    ModulePopulation,
    module_changes,
    module_populations,
    module_titles,
    modules_far_from_median,
    representative_modules,
)
from lora_analysis.text import join_names, number, overlap_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_analysis.spectra import Side
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
    if (runs["excluded"] != "").any():
        columns["left out of conclusions"] = runs["excluded"].map(lambda reason: reason or "–")
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


# Columns of the controls, which a study with enough unrelated updates has.
# Rows of a table of every source and type of module; results.json has all.
_MAX_ROWS: Final = 60
_CONTROLS: Final = {
    "enrichment_crossed": "crossed",
    "enrichment_through_weight": "through W",
}


# Columns of `Study.changes` in the table of changes, with what noise of equal norm or random
# directions give.
_CHANGES: Final = {
    "mean_drift": "drift of σ",
    "noise_drift": "noise",
    "top_overlap": "φ(W, W + ΔW)",
    "noise_top_overlap": "noise",
    "leading_energy": "in first k",
    "trailing_energy": "in last k",
    "chance_energy": "random",
    "changed_in_bfloat16": "changed as bf16",
    "noise_in_bfloat16": "noise",
}


def weight_changes_table(study: Study) -> ReportTable | None:
    """Return how every source moved W, by type of module: medians over its changed modules.

    None without spectra of W if no source is a full fine-tune: other tables have the sizes then.
    """
    full = study.amplifications
    tuned = any(map(is_fine_tune, study.adapters.values()))
    if full.empty or not (tuned or len(study.changes)):
        return None
    keys = ["module_type", "adapter"]
    spectra = study.spectra[study.spectra["adapter"].isin(full["adapter"])]
    sizes = full[full["at_rank"]].groupby(keys)[["relative_norm", "enrichment"]].median()
    sides: Sequence[str] = SIDES_IN_ORDER if len(study.changes) else ("",)
    medians = study.changes.groupby([*keys, "side"])[list(_CHANGES)].median()
    rows = []
    for key, modules in spectra.groupby(keys, sort=False):
        changed = int((modules["numerical_rank"] > 0).sum())
        size = sizes.loc[key] if key in sizes.index else ()
        numbers = [number(float(value)) for value in size] or ["–", "–"]
        for side in sides:
            row = [*map(str, key), f"{changed} of {len(modules)}", *numbers]
            if side:
                row = [*row[:2], side, *row[2:], *_change_cells(medians, (*key, side))]
            rows.append(tuple(row))
    columns = ["module", "adapter", "changed", "‖ΔW‖/‖W‖", "enrichment"]
    note = (
        "With --spectrum also the drift of W's singular values, the rotation of its leading "
        "directions and the energy of ΔW in them."
    )
    if len(study.changes):
        columns = [*columns[:2], "side", *columns[2:], *_CHANGES.values()]
        directions = int(study.changes["directions"].max())
        note = (
            f"Drift: mean relative change of W's leading {directions} singular values. φ: of the "
            f"leading {directions} directions of W and of W + ΔW. First and last k: share of "
            "‖ΔW‖² in W's directions; k is the rank of the update, of a full fine-tune the highest "
            "rank of an adapter. Changed as bf16: share of entries in which W and W + ΔW differ "
            "once they are stored as bfloat16. Noise: Gaussian noise of ΔW's rank and norm in its "
            "place."
        )
    if len(rows) > _MAX_ROWS:
        note += f" {len(rows) - _MAX_ROWS} more rows are in results.json."
    return ReportTable(
        "weight_changes",
        f"How W moved: medians over the changed modules of a type. {note}",
        tuple(columns),
        tuple(rows[:_MAX_ROWS]),
        text_columns=4 if len(study.changes) else 3,
    )


def _change_cells(medians: pd.DataFrame, key: tuple[str, ...]) -> list[str]:
    """Return the columns of one row of changes; dashes if no module changed."""
    if key not in medians.index:
        return ["–"] * len(_CHANGES)
    return [number(float(medians.loc[key][name])) for name in _CHANGES]


def amplification_table(study: Study) -> ReportTable | None:
    """Return ‖UᵀWV‖, the factor and the enrichment by rank, with their controls.

    Of the tasks that were trained at every rank, as in the finding about them.
    """
    table = with_ranks(study)
    if table.empty:
        return None
    full, tasks = tasks_of_all_ranks(study, table[table["at_rank"]])
    values = {
        "delta_norm": "‖ΔW‖",
        "weight_norm": "‖W‖",
        "projected": "‖UᵀWV‖",
        "projected_weight": "W's own",
        "projected_random": "random",
        "amplification_factor": "factor",
        "chance_factor": "random factor",
        "enrichment": "enrichment",
        **{
            name: title
            for name, title in _CONTROLS.items()
            if name in full and full[name].notna().any()
        },
    }
    rows = [
        (
            str(int(rank)),
            str(of_rank["adapter"].nunique()),
            *(cell(float(of_rank[value].median())) for value in values),
        )
        for rank, of_rank in full.groupby("rank")
    ]
    controls = (
        " Crossed: U of this update with V of an unrelated one; through W: directions that random "
        "vectors take through W. Enrichment is specific to an update only beyond both."
        if any(title in values.values() for title in _CONTROLS.values())
        else ""
    )
    caption = (
        f"Medians over modules and adapters{_of_tasks(tasks)}, at full rank. ‖UᵀWV‖: W along the "
        "directions of ΔW, along its own leading ones and along random ones (root mean square). "
        "Factor: ‖ΔW‖/‖UᵀWV‖; random factor: of random directions and the same ‖ΔW‖; enrichment: "
        f"‖UᵀWV‖ over the random one, so 1 for random directions.{controls}"
    )
    return ReportTable("amplification", caption, ("rank", "adapters", *values.values()),
                       tuple(rows))  # fmt: skip


def _of_tasks(tasks: Sequence[str]) -> str:
    return f" of {join_names(tasks)}" if tasks else ""


def ranks_table(study: Study) -> ReportTable | None:
    """Return medians of the spectra by rank, over the same tasks at every rank."""
    by_rank, tasks = spectra_by_rank(study)
    if not by_rank:
        return None
    rows = []
    for spectra in by_rank:
        low, median, high = spectra.energy_rank_90
        numbers = (spectra.numerical_rank, spectra.effective_rank, spectra.stable_rank, median)
        rows.append(
            (
                str(spectra.rank),
                str(spectra.adapters),
                *map(cell, numbers),
                f"{cell(low)} to {cell(high)}",
                cell(spectra.energy_rank_99),
            )
        )
    columns = ("rank", "adapters", "numerical rank", "effective rank", "stable rank",
               "90 % of ‖ΔW‖²", "quartiles", "99 % of ‖ΔW‖²")  # fmt: skip
    same = _of_tasks(tasks) if len(by_rank) > 1 else ""
    caption = (
        f"Medians over modules and adapters{same}. 90 % and 99 %: number of directions that hold "
        "this share of ‖ΔW‖²; a low number can also mean that the optimizer left the others unused."
    )
    return ReportTable("ranks", caption, columns, tuple(rows))


def module_groups_table(study: Study) -> ReportTable | None:
    """Return medians by module type or, of an image model, by block.

    Size of ΔW, directions, and T of each population.
    """
    changes = module_changes(study)
    if changes is None:
        return None
    groups = group_modules(changes.values.index)
    group_of = {name: title for title, names in groups.items() for name in names}
    grouped = changes.values.groupby(group_of).agg(["size", "median"]).reindex(list(groups))
    table = pd.DataFrame({"modules": grouped["size"], changes.symbol: grouped["median"]})
    spectra = study.spectra[study.spectra["numerical_rank"] > 0]
    energy_rank = spectra.groupby(spectra["module"].map(group_of))["energy_rank_90"]
    table["90 % of ‖ΔW‖²"] = energy_rank.median()
    if len(table) < 2:
        return None
    captions: dict[str, None] = {}  # in order, each once
    for side in SIDES_IN_ORDER:
        for populations in module_populations(study, side)[:1]:
            for population in populations:
                name = f"{side}, {'unrelated' if population.is_unrelated else 'pairs'}"
                medians = population.excess.groupby(group_of).median()
                table[name] = table.index.map(medians).map(overlap_number)
                captions[population.name] = None
    caption = (
        f"{changes.symbol}: median over {changes.of}. Output and input: excess of ω, median over "
        f"modules and {' or '.join(captions)}."
        if captions
        else f"{changes.symbol}: median over {changes.of}."
    )
    by_block = is_image(group_of)
    table = table.rename_axis("block" if by_block else "module type").reset_index()
    name = "blocks" if by_block else "types"
    return ReportTable(name, caption, tuple(table.columns), _rows(table), 1)


# Modules in the table of single modules that are not the representative ones.
_UNUSUAL: Final = 6


def modules_table(study: Study, side: Side) -> ReportTable | None:
    """Return representative and most unusual modules, each value of one population."""
    by_base = module_populations(study, side)
    if not by_base:
        return None
    populations = by_base[0]
    excess = populations[0].excess
    chance = populations[0].rows.groupby("module")["chance_omega"].median()
    changes = module_changes(study)
    modules = study.spectra["module"]
    titles = module_titles(study) if is_image(modules) else {name: name for name in modules}
    # Quartiles over the pairs of each population, once for all modules.
    quartiles = [
        population.rows.groupby("module")["excess_omega"].quantile([0.25, 0.75])
        for population in populations
    ]
    rows = []
    for name, chosen_as in _chosen_modules(excess).items():
        cells = [
            text
            for population, of_population in zip(populations, quartiles, strict=True)
            for text in _population_cells(population, of_population, name)
        ]
        size = np.nan if changes is None else changes.values.get(name, np.nan)
        random = overlap_number(float(chance[name]))
        rows.append((titles[name], chosen_as, *cells, random, cell(float(size))))
    names = _population_names(populations)
    columns = (
        "module", "chosen as",
        *(text for name in names for text in (name, f"quartiles, {name}")),
        "random ω", changes.symbol if changes is not None else "‖ΔW‖",
    )  # fmt: skip
    caption = _modules_caption(populations, side)
    return ReportTable(f"modules, {side} side", caption, columns, tuple(rows), 2)


def _chosen_modules(excess: pd.Series) -> dict[str, str]:
    """Return the modules of the table in its order, with why each is in it."""
    representative = [name for name in representative_modules(list(excess.index)) if name in excess]
    farthest = modules_far_from_median(excess, len(excess))
    unusual = [name for name in farthest if name not in representative][:_UNUSUAL]
    return dict.fromkeys(representative, "representative") | dict.fromkeys(unusual, "unusual")


def _population_cells(
    population: ModulePopulation, quartiles: pd.Series, module: str
) -> tuple[str, str]:
    """Return the median and the quartiles of one module; dashes if no pair has it."""
    if module not in population.excess.index:
        return "–", "–"
    low, high = (overlap_number(float(quartiles[module, share])) for share in (0.25, 0.75))
    return overlap_number(float(population.excess[module])), f"{low} to {high}"


def _population_names(populations: Sequence[ModulePopulation]) -> list[str]:
    return ["unrelated" if population.is_unrelated else "pairs" for population in populations]


def _modules_caption(populations: Sequence[ModulePopulation], side: Side) -> str:
    base = f" on {populations[0].base}" if populations[0].base else ""
    explained = "; ".join(
        f"{name.capitalize()}: {population.name}"
        for name, population in zip(_population_names(populations), populations, strict=True)
    )
    median = overlap_number(float(populations[0].excess.median()))
    return (
        f"Excess of ω, {side} side{base}, median and quartiles over pairs. "
        f"{explained}. Unusual: farthest from the median over modules "
        f"({median}), in both directions. All modules are in "
        "tables/similarities.csv."
    )
