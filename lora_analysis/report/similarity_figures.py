"""Figures of similarity: heat-maps next to an unrelated pair, T of all pairs, modules and layers.

Also the similarity matrix of all adapters, and the steps of a training.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.blocks import forward_order, is_image, locate_module
from lora_analysis.conclusions.comparison_findings import overlaps_with_last_step
from lora_analysis.conclusions.comparison_values import SIDES_IN_ORDER
from lora_analysis.plots.heatmap import EXCESS_LIMITS
from lora_analysis.report.representatives import (
    DrawnPair,
    choose_drawn_pairs,
    common_modules,
    module_changes,
    module_populations,
    module_titles,
    modules_far_from_median,
    representative_modules,
)
from lora_analysis.similarity import random_similarity
from lora_analysis.studies.base_models import several_bases
from lora_analysis.studies.pair_classes import PairClass
from lora_analysis.text import number, overlap_number

if TYPE_CHECKING:
    import pandas as pd
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
    """Yield one of the `choose_drawn_pairs` next to an unrelated pair; nothing without one."""
    pair = choose_drawn_pairs(study).get(name)
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


# Heat-maps of single modules, which the reader opens.
MODULES_DRAWN = 12
# From so many adapters on, one figure of all pairs takes megabytes.
_MANY = 500


def map_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the excess of ω by layer and type, of one population and of unrelated pairs."""
    by_side = {side: module_populations(study, side) for side in SIDES_IN_ORDER}
    across = _axes_of_map(study.spectra["module"])
    for index in range(max(map(len, by_side.values()), default=0)):
        maps, sentences = [], []
        for side, of_side in by_side.items():
            if index >= len(of_side) or len(of_side[index][0].excess) < 3:
                continue
            populations = of_side[index]
            for component in _components(populations[0].excess.index):
                of = f"{component}: " if component else ""
                maps.append(
                    [
                        plots.resolve_module_map(
                            _select_component(population.excess, component) or {"": float("nan")},
                            limits=EXCESS_LIMITS,
                            label="excess of ω",
                            title=f"{of}{population.name}, {side} side",
                        )
                        for population in populations
                    ]
                )
            medians = ", ".join(
                f"{population.name} {overlap_number(float(population.excess.median()))}"
                for population in populations
            )
            base = populations[0].base
            sentences.append(f"{side} side{f' on {base}' if base else ''}: {medians}")
        if maps:
            yield ReportFigure(
                name="modules" if not index else f"modules_{index + 1}",
                title="Where adapters agree.",
                caption=(
                    f"Excess of ω over the random baseline by {across}, medians over "
                    f"the pairs of one population each. Medians over modules: "
                    f"{'; '.join(sentences)}. Gray: not usable, or no such module."
                ),
                alt=f"Overlap excess by {across}. {'; '.join(sentences)}.",
                figure=plots.figure_module_maps(maps),
            )


def _components(names: Iterable[str]) -> list[str]:
    """Return the components of an image model that modules are in; one empty name otherwise."""
    return list(dict.fromkeys(locate_module(name).component for name in forward_order(names)))


def _axes_of_map(names: Iterable[str]) -> str:
    return "block and part" if is_image(names) else "layer and module type"


def _select_component(values: pd.Series, component: str) -> dict[str, float]:
    """Return the values of the modules in a component."""
    return {
        str(name): float(value)
        for name, value in values.items()
        if locate_module(str(name)).component == component
    }


def change_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield ‖ΔW‖/‖W‖, or ‖ΔW‖ without a base, by layer and type, and sorted."""
    changes = module_changes(study)
    if changes is None or len(changes.values) < 3:
        return
    values = changes.values.to_dict()
    top, bottom = changes.values.idxmax(), changes.values.idxmin()
    by_block = is_image(values)
    titles = module_titles(study) if by_block else {name: name for name in values}
    ends = (
        f"largest: {titles[top]} ({number(changes.values[top])}), smallest: {titles[bottom]} "
        f"({number(changes.values[bottom])})"
    )
    across = _axes_of_map(values)
    if by_block or len({name.rpartition(".")[0] for name in values}) > 1:
        maps = [
            [
                plots.resolve_module_map(
                    _select_component(changes.values, component),
                    limits=(0.0, float(changes.values.max()) or 1.0),
                    label=changes.symbol,
                    title=component,
                )
            ]
            for component in _components(values)
        ]
        figure = plots.figure_module_maps(maps, width=4.6)
        yield ReportFigure(
            name="changes_map",
            title=f"{changes.symbol} by {across}.",
            caption=f"Median over {changes.of}.{changes.note}",
            alt=f"Map of {changes.symbol} by {across}; {ends}.",
            figure=figure,
        )
    axes = plots.plot_bars(
        values,
        plots.new_axes(height=0.6 + 0.14 * max(4, min(len(values), 25))),
        xlabel=changes.symbol,
    )
    yield ReportFigure(
        name="changes",
        title=f"{changes.symbol}, sorted.",
        caption=f"The same medians; {ends}.",
        alt=f"Bars of {changes.symbol} per module; {ends}.",
        figure=axes.figure,  # type: ignore[arg-type]
    )


_QUANTITIES = {
    "output": "mean over modules of the excess of ω over the random baseline, output side",
    "input": "the same on the input side, without modules that share their initialization",
    "cosine": "signed cosine of the whole updates (random: 0)",
}


def matrix_figure(study: Study, key: str) -> Iterator[ReportFigure]:
    """Yield the similarity matrix of all adapters, with marks of tasks."""
    matrix = study.similarity_matrix
    if matrix is None or len(matrix.labels) < 3:
        return
    if len(matrix.labels) > _MANY:
        gc.collect()  # figures hold themselves, and here a large array
    triangle = np.concatenate([row[i + 1 :] for i, row in enumerate(matrix.matrix(key))])
    if np.isnan(triangle).all():
        return
    median = overlap_number(float(np.nanmedian(triangle)))
    del triangle
    tasks = {
        str(label): str(task)
        for label, task in zip(study.runs["adapter"], study.runs["task"], strict=True)
        if isinstance(task, str)
    }
    size = 3.4 if len(matrix.labels) <= 24 else 4.4
    axes = plots.plot_clustermap(
        matrix, plots.new_axes(size, size + 0.25), what=key, groups=tasks or None
    )
    untrained = " Untrained adapters are last, outside the tree." if matrix.untrained() else ""
    yield ReportFigure(
        name=f"similarity_matrix_{key}",
        title=f"Similarity matrix, {key}.",
        caption=(
            f"{len(matrix.labels)} adapters, all pairs: {_QUANTITIES[key]}. Ordered by average "
            "linkage on the output side, whose tree is above"
            f"{'; colors: tasks' if tasks else ''}; gray: undefined.{untrained}"
        ),
        alt=f"Similarity matrix, {_QUANTITIES[key]}; median of pairs {median}.",
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
    """Yield heat-maps of the modules that are farthest from the median, on the output side."""
    pairs, populations = choose_drawn_pairs(study), module_populations(study, "output")
    if not pairs or not populations:
        return
    pair = next(iter(pairs.values()))
    common = set(common_modules(study, pair.a, pair.b))
    excess = populations[0][0].excess
    modules = modules_far_from_median(excess[excess.index.isin(common)], MODULES_DRAWN)
    titles = module_titles(study)
    for i, module in enumerate(modules, start=1):
        panels, corners = module_panels(study, pair, module, "output")
        yield ReportFigure(
            name=f"module_{i}",
            title=f"{titles[module]}.",
            caption=f"{module}: φ(i, j), output side. {legend(pair)}",
            alt=f"Heat-maps of subspace similarity in {titles[module]}. {corners}.",
            figure=plots.figure_grid([panels], width=5.5),
        )
