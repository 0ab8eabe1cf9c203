"""Figures of many modules or adapters: layers and types, similarity matrix, training steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.chance import excess
from lora_analysis.conclusions.comparisons import SIDES_IN_ORDER
from lora_analysis.conclusions.run_findings import overlaps_with_last_step
from lora_analysis.plots.heatmap import EXCESS_LIMITS
from lora_analysis.report.representatives import drawn_pairs, modules_far_from_median
from lora_analysis.report.similarity_figures import ReportFigure
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import per_base
from lora_analysis.text import number, plural

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.plots import ModuleMap
    from lora_analysis.studies import Study

MODULES_DRAWN = 40
# From so many adapters on, one figure of all pairs takes megabytes.
_MANY = 500


def map_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the excess of φ(1, 1) and φ(r, r) by layer and type, for both sides of each base."""
    drawn = 0
    for base, of_base in per_base(study, study.similarities):
        rows, pairs = _mapped_pairs(of_base)
        if rows["module"].nunique() >= 3:
            drawn += 1
            name = "modules" if drawn == 1 else f"modules_{drawn}"
            yield _map_figure(rows, f"{pairs} on {base}" if base else pairs, name)


def _map_figure(rows: pd.DataFrame, pairs: str, name: str) -> ReportFigure:
    maps = [[_module_map(rows, side, cell) for cell in ("1_1", "r_r")] for side in SIDES_IN_ORDER]
    medians = "; ".join(
        f"{side} side {quantity}: median {number(float(np.nanmedian(panel.data)))}"
        for side, row in zip(SIDES_IN_ORDER, maps, strict=True)
        for quantity, panel in zip(("φ(1,1)", "φ(r,r)"), row, strict=True)
        if np.isfinite(panel.data).any()
    )
    return ReportFigure(
        name=name,
        title="The whole model.",
        caption=(
            "Excess of φ over the random baseline, (φ − c)/(1 − c), by layer and module type: "
            f"medians over {pairs}. Gray: all values excluded (degenerate directions, or a shared "
            "initialization on the input side)."
        ),
        alt=f"Overlap excess by layer and module type. {medians}.",
        figure=plots.figure_module_maps(maps),
    )


def _mapped_pairs(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows behind the maps, and which they are: pairs of one task, else all pairs."""
    table = table[
        (table["initialization"] != InitRelation.SAME_RUN)
        & ~table["relation"].isin([Relation.SAME_RUN, Relation.EARLIER])
    ]
    same_task = (
        Relation.OTHER_RANK, Relation.OTHER_SEED, Relation.OTHER_RANK_AND_SEED, Relation.REPEATED,
    )  # fmt: skip
    same = table[table["relation"].isin(same_task)]
    if len(same):
        return same, f"{plural(same.groupby(['a', 'b']).ngroups, 'pair')} of one task"
    rest = table[table["relation"].isin([Relation.UNKNOWN, Relation.OTHER_TASK])]
    pairs = plural(rest.groupby(["a", "b"]).ngroups, "pair")
    return rest, f"{pairs} of unknown relation or different tasks"


def _module_map(rows: pd.DataFrame, side: str, cell: str) -> ModuleMap:
    rows = rows[rows["side"] == side]
    every = dict.fromkeys(rows["module"], np.nan)
    if side == "input":
        rows = rows[~rows["shared_init"]]
    if cell == "1_1":
        rows = rows[rows["degeneracy_1_1"] == ""]
    values = excess(rows[f"phi_{cell}"], rows[f"chance_{cell}"])
    medians = rows.assign(excess=values).groupby("module", sort=False)["excess"].median()
    return plots.resolve_module_map(
        every | medians.to_dict(),
        limits=EXCESS_LIMITS,
        label="excess",
        title=f"φ({cell.replace('_', ', ')}), {side} side",
    )


def clustermap_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the similarity matrix of all adapters: both sides and the signed cosine."""
    matrix = study.similarity_matrix
    if matrix is None or len(matrix.labels) < 3:
        return
    quantities = {
        "output": "mean over modules of the excess of ω over the random baseline, output side",
        "input": "the same on the input side, without modules that share their initialization",
        "cosine": "signed cosine of the whole updates (random: 0)",
    }
    untrained = " Untrained adapters are last, outside the tree." if matrix.untrained() else ""
    size = 3.3 if len(matrix.labels) <= 24 else 4.4
    for key, quantity in quantities.items():
        if len(matrix.labels) > _MANY:
            gc.collect()  # figures hold themselves, and here a large array
        triangle = np.concatenate([row[i + 1 :] for i, row in enumerate(matrix.matrix(key))])
        if np.isnan(triangle).all():
            continue
        median = number(float(np.nanmedian(triangle)))
        axes = plots.plot_clustermap(matrix, plots.new_axes(size, size + 0.15), what=key)
        yield ReportFigure(
            name=f"similarity_matrix_{key}",
            title=f"Similarity matrix, {key}.",
            caption=(
                f"{len(matrix.labels)} adapters, all pairs: {quantity}. Ordered by average linkage "
                f"on the output side, whose tree is above; gray: undefined.{untrained}"
            ),
            alt=f"Similarity matrix, {quantity}; median of pairs {median}.",
            figure=axes.figure,  # type: ignore[arg-type]
        )


def step_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield how the checkpoints of each run approach its last; nothing without steps."""
    series = {}
    for rows in overlaps_with_last_step(study):
        steps = [*rows["step"], rows["last_step"].iloc[0]]
        series[str(rows["last"].iloc[0])] = (steps, [*rows["omega"], 1.0])
    if series:
        axes = plots.plot_trajectories(series, plots.new_axes())
        yield ReportFigure(
            name="steps",
            title="Training steps.",
            caption=(
                "ω of each checkpoint with the last of its run, output side, median over modules; "
                "1 by construction at the last."
            ),
            alt=f"Overlap with the last checkpoint over training steps for {', '.join(series)}.",
            figure=axes.figure,  # type: ignore[arg-type]
        )


def single_module_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield heat-maps of both sides for the modules that are farthest from the median."""
    pairs = drawn_pairs(study)
    if not pairs:
        return
    a, b = next(iter(pairs.values()))
    for i, module in enumerate(modules_far_from_median(study, a, b, MODULES_DRAWN), start=1):
        grids = {side: study.grid(a, b, module, side=side) for side in SIDES_IN_ORDER}
        panels = [plots.Panel(grid, f"{side} side") for side, grid in grids.items()]
        corners = "; ".join(f"{side}: φ(1,1) = {number(g.at(1, 1))}" for side, g in grids.items())
        yield ReportFigure(
            name=f"module_{i}",
            title=f"{module}.",
            caption=f"φ(i, j) between {a} (i, down) and {b} (j, across).",
            alt=f"Heat-maps of subspace similarity in {module}. {corners}.",
            figure=plots.figure_grid([panels], width=4.4),
        )
