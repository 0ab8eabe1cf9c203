"""The figures of a report: which results are drawn, under which title and caption."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.chance import excess
from lora_analysis.conclusions import level, number
from lora_analysis.conclusions.levels import on
from lora_analysis.plots.panels import SMALL_CHANCE
from lora_analysis.report.selection import (
    common_modules,
    drawn_pairs,
    short_name,
    telling_modules,
)
from lora_analysis.shared_init import InitRelation
from lora_analysis.similarity import random_similarity
from lora_analysis.spectra import SIDES, Side
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import per_base

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_analysis.similarity import SimilarityGrid
    from lora_analysis.studies import Study

_LEGEND = (
    "The bar at the color scale spans isotropic chance; light lines mark directions whose "
    "singular values nearly coincide, so that noise may turn them."
)
_DIRECTIONS = {"input": "right singular vectors", "output": "left singular vectors"}


@dataclass(frozen=True, slots=True, eq=False)
class ReportFigure:
    """A drawn figure with its words; ``alt`` says what a reader who cannot see it should know."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


def _named(study: Study, a: str, b: str, side: Side) -> dict[str, SimilarityGrid]:
    modules = telling_modules(common_modules(study, a, b))
    shorts = [short_name(name) for name in modules]
    titles = shorts if len(set(shorts)) == len(shorts) else modules
    return {
        title: study.grid(a, b, name, side=side)
        for title, name in zip(titles, modules, strict=True)
    }


def _above(grids: dict[str, SimilarityGrid]) -> str:
    return (
        " Below: the same above chance, (φ − c)/(1 − c), where 0 is what random directions give."
        if any(grid.chance.size and grid.chance.max() > SMALL_CHANCE for grid in grids.values())
        else ""
    )


def _spoken(grids: dict[str, SimilarityGrid], side: Side) -> str:
    """Return what a reader who cannot see the heat-maps should know."""
    corners = "; ".join(f"{name}: φ(1,1) = {number(grid.at(1, 1))}" for name, grid in grids.items())
    return f"Heat-maps of subspace similarity, {side} side. {corners}."


def rank_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the paper's Figure 3 for either side; nothing if all ranks are equal."""
    pair = drawn_pairs(study).get("ranks")
    if pair is None:
        return
    a, b = pair
    for side in reversed(SIDES):
        grids = _named(study, a, b, side)
        yield ReportFigure(
            name=f"ranks_{side}",
            title=f"Two ranks, {side} side.",
            caption=(
                f"φ(i, j) between {a} (i, down) and {b} (j, across), {_DIRECTIONS[side]} of ΔW, "
                f"laid out as Figure 3 of the LoRA paper (which plots those of A alone); right: "
                f"the corner, triangle j ≤ i. {_LEGEND}{_above(grids)}"
            ),
            alt=_spoken(grids, side),
            figure=plots.figure_ranks(grids),
        )


def seed_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the paper's Figure 4 for either side; nothing without two seeds of one task."""
    pair = drawn_pairs(study).get("seeds")
    if pair is not None:
        yield from _beside_random(study, *pair, name="seeds", title="Two seeds")


def pair_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield two adapters of unknown relation, where no others are drawn."""
    pair = drawn_pairs(study).get("pair")
    if pair is not None:
        yield from _beside_random(study, *pair, name="pair", title="Two adapters")


def _beside_random(
    study: Study, a: str, b: str, *, name: str, title: str
) -> Iterator[ReportFigure]:
    for side in reversed(SIDES):
        grids = _named(study, a, b, side)
        first = next(iter(grids.values()))
        grids["random Gaussian"] = random_similarity(first.dimension, first.values.shape)
        yield ReportFigure(
            name=f"{name}_{side}",
            title=f"{title}, {side} side.",
            caption=(
                f"φ(i, j) between {a} and {b}, {_DIRECTIONS[side]} of ΔW, beside two random "
                f"matrices, laid out as Figure 4 of the LoRA paper. {_LEGEND}{_above(grids)}"
            ),
            alt=_spoken(grids, side),
            figure=plots.figure_seeds(grids),
        )


_GROUPS: dict[Relation, str] = {
    Relation.OTHER_RANK: "same task, other rank",
    Relation.OTHER_RANK_AND_SEED: "same task, other rank and seed",
    Relation.OTHER_SEED: "same task, other seed",
    Relation.REFERENCE: "other task, other seed (reference)",
    Relation.SHARED_SEED: "other task, same seed (shared initial A)",
    Relation.UNKNOWN: "relation not known",
}


def level_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield φ(1, 1) of every pair and module by relation, beside chance, for either side."""
    table = study.similarities
    table = table[table["initialization"] != InitRelation.SAME_RUN]
    reference = level(study.select(Relation.REFERENCE, "output")) is not None
    if not table["relation"].isin(_GROUPS).any():
        return
    for side in reversed(SIDES):
        own = table[(table["side"] == side) & (table["degeneracy_1_1"] == "")]
        if own.empty:
            continue
        above = own["dimension"].nunique() > 1  # then chance differs from module to module
        values = excess(own["phi_1_1"], own["chance_1_1"]) if above else own["phi_1_1"].to_numpy()
        own = own.assign(value=values)
        groups = {
            f"{label}{on(base)}": rows.loc[rows["relation"] == relation, "value"].to_numpy()
            for base, rows in per_base(study, own)
            for relation, label in _GROUPS.items()
            if (rows["relation"] == relation).any()
        }
        chance = 0.0 if above else float(own["chance_1_1"].iloc[0])
        what = "φ(1,1) above chance" if above else "φ(1,1)"
        medians = "; ".join(
            f"{label}: median {number(float(np.median(v)))}" for label, v in groups.items()
        )
        size = plots.new_axes(height=0.75 + 0.42 * len(groups))
        axes = plots.plot_levels(groups, chance, size, xlabel=f"{what}, {side} side")
        yield ReportFigure(
            name=f"levels_{side}",
            title=f"The first {side} direction, by relation.",
            caption=(
                "One point is one module of one pair, the bar the quartiles; the line is isotropic "
                "chance. "
                + (
                    "A verdict compares a group with the reference."
                    if reference
                    else "Without a reference there is no verdict."
                )
                + (
                    " Groups that share their initial A are artifacts, largest in φ(r, r)."
                    if side == "input" and own["shared_init"].any()
                    else ""
                )
            ),
            alt=f"{what} on the {side} side by relation of the pair. {medians}.",
            figure=axes.figure,  # type: ignore[arg-type]  # no sub-figures here
        )
