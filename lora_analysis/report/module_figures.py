"""Figures of many modules or adapters: layers and types, similarity matrix, training steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.chance import excess
from lora_analysis.conclusions import number
from lora_analysis.conclusions.levels import on
from lora_analysis.conclusions.runs import last_steps
from lora_analysis.plots.heatmap import EXCESS_LIMITS
from lora_analysis.report.figures import ReportFigure
from lora_analysis.report.selection import drawn_pairs, most_telling
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import per_base
from lora_analysis.text import plural

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.plots import ModuleMap
    from lora_analysis.studies import Study

MODULES_DRAWN = 40
# From so many adapters on, one figure of all pairs takes megabytes.
_MANY = 500


def map_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield φ(1, 1) and φ(r, r) above chance by layer and type, for either side of each base."""
    drawn = 0
    for base, of_base in per_base(study, study.similarities):
        rows, whom = _mapped(of_base)
        if rows["module"].nunique() >= 3:
            drawn += 1
            yield _map_figure(
                rows, f"{whom}{on(base)}", "modules" if drawn == 1 else f"modules_{drawn}"
            )


def _map_figure(rows: pd.DataFrame, whom: str, name: str) -> ReportFigure:
    maps = [[_map(rows, side, cell) for cell in ("1_1", "r_r")] for side in ("output", "input")]
    spoken = "; ".join(
        f"{side} side {name}: median {number(float(np.nanmedian(one.data)))}"
        for side, row in zip(("output", "input"), maps, strict=True)
        for name, one in zip(("φ(1,1)", "φ(r,r)"), row, strict=True)
        if np.isfinite(one.data).any()
    )
    return ReportFigure(
        name=name,
        title="The whole model.",
        caption=(
            f"φ above chance, (φ − c)/(1 − c), by layer and type of module: medians over {whom}. "
            "Gray: nothing that counts (ill-defined directions, a shared start on the input side)."
        ),
        alt=f"Overlap above chance by layer and type of module. {spoken}.",
        figure=plots.figure_module_maps(maps),
    )


def _mapped(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows behind the maps, and who they are: one task's pairs, else all pairs."""
    table = table[
        (table["initialization"] != InitRelation.SAME_RUN)
        & ~table["relation"].isin([Relation.SAME_RUN, Relation.EARLIER])
    ]
    same = table[table["relation"].str.startswith("same task")]
    if len(same):
        return same, f"{plural(same.groupby(['a', 'b']).ngroups, 'pair')} of one task"
    rest = table[table["relation"].isin([Relation.UNKNOWN, Relation.REFERENCE])]
    pairs = plural(rest.groupby(["a", "b"]).ngroups, "pair")
    return rest, f"{pairs}, relation not known or other task"


def _map(rows: pd.DataFrame, side: str, cell: str) -> ModuleMap:
    own = rows[rows["side"] == side]
    every = dict.fromkeys(own["module"], np.nan)
    if side == "input":
        own = own[~own["shared_init"]]
    if cell == "1_1":
        own = own[own["degeneracy_1_1"] == ""]
    above = excess(own[f"phi_{cell}"], own[f"chance_{cell}"])
    medians = own.assign(above=above).groupby("module", sort=False)["above"].median()
    return plots.resolve_module_map(
        every | medians.to_dict(),
        limits=EXCESS_LIMITS,
        label="above chance",
        title=f"φ({cell.replace('_', ', ')}), {side} side",
    )


def clustermap_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield every adapter against every other, both sides and the signed cosine."""
    similarity_matrix = study.similarity_matrix
    if similarity_matrix is None or len(similarity_matrix.labels) < 3:
        return
    words = {
        "output": "mean over modules of ω above chance, (ω − c)/(1 − c), output side",
        "input": "the same on the input side, modules with a shared start left out",
        "cosine": "signed cosine of the whole updates, chance 0",
    }
    untrained = (
        " Untrained adapters stand last, outside the tree." if similarity_matrix.untrained() else ""
    )
    size = 3.3 if len(similarity_matrix.labels) <= 24 else 4.4
    for what, word in words.items():
        if len(similarity_matrix.labels) > _MANY:
            gc.collect()  # figures hold themselves, and here a large array
        above = np.concatenate(
            [row[i + 1 :] for i, row in enumerate(similarity_matrix.matrix(what))]
        )
        if np.isnan(above).all():
            continue
        yield ReportFigure(
            name=f"similarity_matrix_{what}",
            title=f"Similarity matrix, {what}.",
            caption=(
                f"{len(similarity_matrix.labels)} adapters in pairs: {word}. Ordered by average "
                f"linkage on the output side, the tree above; gray: no number.{untrained}"
            ),
            alt=f"Similarity matrix, {word}; median of pairs {number(float(np.nanmedian(above)))}.",
            figure=plots.plot_clustermap(
                similarity_matrix, plots.new_axes(size, size + 0.15), what=what
            ).figure,  # type: ignore[arg-type]
        )


def step_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield how the checkpoints of each run approach its last; nothing without steps."""
    series = {}
    for rows in last_steps(study):
        ends = [*rows["step"], rows["last_step"].iloc[0]]
        series[str(rows["last"].iloc[0])] = (ends, [*rows["omega"], 1.0])
    if series:
        axes = plots.plot_trajectories(series, plots.new_axes())
        yield ReportFigure(
            name="steps",
            title="Training steps.",
            caption=(
                "ω of each checkpoint with the last of its run, output side, median over modules: "
                "1 by construction at the last."
            ),
            alt=f"Overlap with the last checkpoint over training steps for {', '.join(series)}.",
            figure=axes.figure,  # type: ignore[arg-type]
        )


def telling_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield heat-maps of both sides, module by module, for those that differ most."""
    pairs = drawn_pairs(study)
    if not pairs:
        return
    a, b = next(iter(pairs.values()))
    for at, module in enumerate(most_telling(study, a, b, MODULES_DRAWN)):
        grids = {side: study.grid(a, b, module, side=side) for side in ("output", "input")}
        panels = [plots.Panel(grid, f"{side} side") for side, grid in grids.items()]
        corners = "; ".join(f"{side}: φ(1,1) = {number(g.at(1, 1))}" for side, g in grids.items())
        yield ReportFigure(
            name=f"module_{at + 1}",
            title=f"{module}.",
            caption=f"φ(i, j) between {a} (i, down) and {b} (j, across).",
            alt=f"Heat-maps of subspace similarity in {module}. {corners}.",
            figure=plots.figure_grid([panels], width=4.4),
        )
