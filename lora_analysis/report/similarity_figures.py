"""Figures of subspace similarity: heat-maps of two adapters, and φ(1, 1) of all pairs by group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.chance import excess
from lora_analysis.conclusions.comparisons import SIDES_IN_ORDER
from lora_analysis.plots.panels import SMALL_CHANCE
from lora_analysis.report.representatives import (
    common_modules,
    drawn_pairs,
    representative_modules,
    short_name,
)
from lora_analysis.shared_init import InitRelation
from lora_analysis.similarity import random_similarity
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import per_base
from lora_analysis.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_analysis.similarity import SimilarityGrid
    from lora_analysis.spectra import Side
    from lora_analysis.studies import Study

_LEGEND = (
    "The bar at the color scale spans the random baseline; light lines mark nearly degenerate "
    "directions (singular values that nearly coincide)."
)
_DIRECTIONS = {"input": "right singular vectors", "output": "left singular vectors"}


@dataclass(frozen=True, slots=True, eq=False)
class ReportFigure:
    """A drawn figure with its words; ``alt`` describes it for readers who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


def rank_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the paper's Figure 3 for each side; nothing if all ranks are equal."""
    pair = drawn_pairs(study).get("ranks")
    if pair is None:
        return
    a, b = pair
    for side in SIDES_IN_ORDER:
        grids = _grids(study, a, b, side)
        yield ReportFigure(
            name=f"ranks_{side}",
            title=f"Two ranks, {side} side.",
            caption=(
                f"φ(i, j) between {a} (i, down) and {b} (j, across), {_DIRECTIONS[side]} of ΔW, in "
                "the layout of Figure 3 of the LoRA paper (which plots those of A alone); right: "
                f"the corner, triangle j ≤ i. {_LEGEND}{_excess_row(grids)}"
            ),
            alt=_alt_text(grids, side),
            figure=plots.figure_ranks(grids),
        )


def seed_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the paper's Figure 4 for each side; nothing without two seeds of one task."""
    yield from _figures_next_to_random(study, "seeds", "Two seeds")


def pair_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield two adapters of unknown relation, if no others are drawn."""
    yield from _figures_next_to_random(study, "pair", "Two adapters")


def _figures_next_to_random(study: Study, name: str, title: str) -> Iterator[ReportFigure]:
    pair = drawn_pairs(study).get(name)
    if pair is None:
        return
    a, b = pair
    for side in SIDES_IN_ORDER:
        grids = _grids(study, a, b, side)
        first = next(iter(grids.values()))
        grids["random Gaussian"] = random_similarity(first.dimension, first.values.shape)
        yield ReportFigure(
            name=f"{name}_{side}",
            title=f"{title}, {side} side.",
            caption=(
                f"φ(i, j) between {a} and {b}, {_DIRECTIONS[side]} of ΔW, and between two random "
                "matrices, in the layout of Figure 4 of the LoRA paper. "
                f"{_LEGEND}{_excess_row(grids)}"
            ),
            alt=_alt_text(grids, side),
            figure=plots.figure_seeds(grids),
        )


def _grids(study: Study, a: str, b: str, side: Side) -> dict[str, SimilarityGrid]:
    """Return φ of two adapters in representative modules, by a title that tells them apart."""
    modules = representative_modules(common_modules(study, a, b))
    shorts = [short_name(name) for name in modules]
    titles = shorts if len(set(shorts)) == len(shorts) else modules
    return {
        title: study.grid(a, b, name, side=side)
        for title, name in zip(titles, modules, strict=True)
    }


def _excess_row(grids: dict[str, SimilarityGrid]) -> str:
    """Return the sentence about the second row of panels, if one is drawn."""
    return (
        " Below: the excess over the random baseline, (φ − c)/(1 − c), which is 0 for random "
        "directions."
        if any(grid.chance.size and grid.chance.max() > SMALL_CHANCE for grid in grids.values())
        else ""
    )


def _alt_text(grids: dict[str, SimilarityGrid], side: Side) -> str:
    corners = "; ".join(f"{name}: φ(1,1) = {number(grid.at(1, 1))}" for name, grid in grids.items())
    return f"Heat-maps of subspace similarity, {side} side. {corners}."


_GROUPS: dict[Relation, str] = {
    Relation.OTHER_RANK: "same task, different rank",
    Relation.OTHER_RANK_AND_SEED: "same task, different rank and seed",
    Relation.OTHER_SEED: "same task, different seed",
    Relation.OTHER_TASK: "different task and seed (reference)",
    Relation.SHARED_SEED: "different task, same seed (shared initial A)",
    Relation.UNKNOWN: "unknown relation",
}


def group_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield φ(1, 1) of every pair and module by relation of the pair, for each side."""
    table = study.similarities
    table = table[table["initialization"] != InitRelation.SAME_RUN]
    has_reference = not study.population("unrelated", "output").empty
    if not table["relation"].isin(_GROUPS).any():
        return
    for side in SIDES_IN_ORDER:
        rows = table[(table["side"] == side) & (table["degeneracy_1_1"] == "")]
        if rows.empty:
            continue
        is_excess = rows["dimension"].nunique() > 1  # then chance differs from module to module
        phi = rows["phi_1_1"]
        rows = rows.assign(value=excess(phi, rows["chance_1_1"]) if is_excess else phi)
        groups = {
            f"{label} on {base}" if base else label: of_base.loc[
                of_base["relation"] == relation, "value"
            ].to_numpy()
            for base, of_base in per_base(study, rows)
            for relation, label in _GROUPS.items()
            if (of_base["relation"] == relation).any()
        }
        chance = 0.0 if is_excess else float(rows["chance_1_1"].iloc[0])
        quantity = "φ(1,1) excess" if is_excess else "φ(1,1)"
        medians = "; ".join(
            f"{label}: median {number(float(np.median(v)))}" for label, v in groups.items()
        )
        axes = plots.plot_levels(
            groups,
            chance,
            plots.new_axes(height=0.75 + 0.42 * len(groups)),
            xlabel=f"{quantity}, {side} side",
        )
        yield ReportFigure(
            name=f"levels_{side}",
            title=f"The first {side} direction, by relation.",
            caption=(
                "Each point is one module of one pair, the bar shows the quartiles, the line the "
                "random baseline. "
                + (
                    "Conclusions compare each group with the reference."
                    if has_reference
                    else "Conclusions need a reference, and there is none."
                )
                + (
                    " Groups that share their initial A are artifacts, most visibly in φ(r, r)."
                    if side == "input" and rows["shared_init"].any()
                    else ""
                )
            ),
            alt=f"{quantity} on the {side} side by relation of the pair. {medians}.",
            figure=axes.figure,  # type: ignore[arg-type]  # no sub-figures here
        )
