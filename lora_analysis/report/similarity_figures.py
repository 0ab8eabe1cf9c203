"""Figures of subspace similarity: heat-maps next to an unrelated pair, and T of all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.conclusions.comparison_values import SIDES_IN_ORDER
from lora_analysis.report.representatives import (
    DrawnPair,
    common_modules,
    drawn_pairs,
    module_titles,
    representative_modules,
)
from lora_analysis.similarity import random_similarity
from lora_analysis.studies.base_models import several_bases
from lora_analysis.studies.pair_classes import PairClass
from lora_analysis.text import number, overlap_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_analysis.plots import Panel
    from lora_analysis.similarity import SimilarityGrid
    from lora_analysis.spectra import Side
    from lora_analysis.studies import Study

_DIRECTIONS = {"input": "right singular vectors", "output": "left singular vectors"}


@dataclass(frozen=True, slots=True, eq=False)
class ReportFigure:
    """A drawn figure with its words; ``alt`` describes it for readers who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


def pair_figures(study: Study, *, name: str, title: str) -> Iterator[ReportFigure]:
    """Yield one of the `drawn_pairs` next to an unrelated pair; nothing without one."""
    pair = drawn_pairs(study).get(name)
    if pair is None:
        return
    usable = study.similarities[study.similarities["usable"].astype(bool)]
    modules = representative_modules(common_modules(study, pair.a, pair.b))
    titles = module_titles(study)
    for side in SIDES_IN_ORDER:
        # A side that counts nowhere is left out if the other one shows the pair.
        if side == "input" and not (usable["side"] == side).any() and len(usable):
            continue
        rows, corners = [], []
        for module in modules:
            panels, corner = module_panels(study, pair, module, side)
            rows.append(panels)
            corners.append(f"{titles[module]}: {corner}")
        yield ReportFigure(
            name=f"{name}_{side}",
            title=f"{title}, {side} side.",
            caption=(
                f"φ(i, j), {_DIRECTIONS[side]} of ΔW: top i directions of the first adapter (down) "
                f"and top j of the second (across). {legend(pair)}"
            ),
            alt=f"Heat-maps of subspace similarity, {side} side. {'; '.join(corners)}.",
            figure=plots.figure_grid(rows),
        )


def legend(pair: DrawnPair) -> str:
    """Return the sentences that name the panels of a pair."""
    unrelated = (
        f"center: {pair.unrelated[0]} and {pair.unrelated[1]}, an unrelated pair of the same ranks "
        "(with the median T of such pairs)"
        if pair.unrelated
        else "no unrelated pair has these ranks"
    )
    return (
        f"Left: {pair.a} and {pair.b} ({pair.relation}); {unrelated}; right: two random matrices. "
        "Only what exceeds the unrelated pair is specific to the left one."
    )


def module_panels(
    study: Study, pair: DrawnPair, module: str, side: Side
) -> tuple[list[Panel], str]:
    """Return the panels of one module: the pair, an unrelated pair, random; and their corners."""
    first = study.grid(pair.a, pair.b, module, side=side)
    grids: dict[str, SimilarityGrid] = {module_titles(study)[module]: first}
    if pair.unrelated and all(module in study.adapters[label] for label in pair.unrelated):
        grids["unrelated pair"] = study.grid(*pair.unrelated, module, side=side)
    if first.values.size:
        grids["random"] = random_similarity(first.dimension, first.values.shape)
    corners = ", ".join(
        f"{title} φ(1,1) {number(grid.at(1, 1))}"
        for title, grid in zip(("pair", *list(grids)[1:]), grids.values(), strict=True)
        if grid.values.size
    )
    return [plots.Panel(grid, title) for title, grid in grids.items()], corners


_CLASSES: dict[PairClass, str] = {
    PairClass.UNKNOWN: "relation unknown",
    PairClass.SHARED_INIT: "shared initialization",
    PairClass.SAME_SEED: "different tasks, same seed",
    PairClass.SAME_DATA_ORDER: "same task and seed",
}


def level_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield T of every pair by its class, for each side with usable modules."""
    pairs = study.pairs
    several = several_bases(study)
    for side in SIDES_IN_ORDER:
        values = pairs[f"mean_excess_{side}"].astype(float)
        population = pairs[f"population_{side}"]
        chosen = {
            "same task, different seeds": population == "replicate",
            "unrelated: different tasks and seeds": population == "unrelated",
            **{
                name: (pairs["pair_class"] == of_class) & (population == "")
                for of_class, name in _CLASSES.items()
            },
        }
        groups = {name: values[rows & values.notna()].to_numpy() for name, rows in chosen.items()}
        groups = {name: group for name, group in groups.items() if group.size}
        if not groups or sum(map(len, groups.values())) < 3:
            continue
        medians = "; ".join(
            f"{name}: median {overlap_number(float(np.median(group)))}"
            for name, group in groups.items()
        )
        axes = plots.plot_levels(
            groups,
            0.0,
            plots.new_axes(height=0.75 + 0.42 * len(groups)),
            xlabel=f"T, {side} side",
            numbers=False,  # the table has them, of the pairs that count
        )
        yield ReportFigure(
            name=f"levels_{side}",
            title=f"T by kind of pair, {side} side.",
            caption=(
                "A point is a pair of adapters"
                f"{' on one base' if several else ''}; bar: quartiles and median. Conclusions "
                "compare pairs of one task with unrelated ones; the other kinds are in no "
                "comparison, and copies and untrained adapters are not drawn."
            ),
            alt=f"T on the {side} side by class of the pair. {medians}.",
            figure=axes.figure,  # type: ignore[arg-type]  # no sub-figures here
        )
