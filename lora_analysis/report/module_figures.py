"""Figures of many modules or adapters: layers and types, similarity matrix, training steps."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.blocks import forward_order, is_image, locate_module
from lora_analysis.conclusions.comparison_findings import overlaps_with_last_step
from lora_analysis.conclusions.comparison_values import SIDES_IN_ORDER
from lora_analysis.plots.heatmap import EXCESS_LIMITS
from lora_analysis.report.representatives import (
    common_modules,
    drawn_pairs,
    module_changes,
    module_populations,
    module_titles,
    modules_far_from_median,
)
from lora_analysis.report.similarity_figures import ReportFigure, legend, module_panels
from lora_analysis.text import number, overlap_number

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.plots import ModuleMap
    from lora_analysis.report.representatives import ModulePopulation
    from lora_analysis.studies import Study

# Heat-maps of single modules, which the reader opens.
MODULES_DRAWN = 12
# From so many adapters on, one figure of all pairs takes megabytes.
_MANY = 500


def map_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the excess of ω by layer and type, of one population and of unrelated pairs."""
    by_side = {side: module_populations(study, side) for side in SIDES_IN_ORDER}
    across = _across(study.spectra["module"])
    for index in range(max(map(len, by_side.values()), default=0)):
        maps, sentences = [], []
        for side, of_side in by_side.items():
            if index >= len(of_side) or len(of_side[index][0].excess) < 3:
                continue
            populations = of_side[index]
            maps += [
                [_population_map(population, side, component) for population in populations]
                for component in _components(populations[0].excess.index)
            ]
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


def _across(names: Iterable[str]) -> str:
    return "block and part" if is_image(names) else "layer and module type"


def _of_component(values: pd.Series, component: str) -> dict[str, float]:
    """Return the values of the modules in a component."""
    return {
        str(name): float(value)
        for name, value in values.items()
        if locate_module(str(name)).component == component
    }


def _population_map(population: ModulePopulation, side: str, component: str) -> ModuleMap:
    of = f"{component}: " if component else ""
    return plots.resolve_module_map(
        _of_component(population.excess, component) or {"": float("nan")},
        limits=EXCESS_LIMITS,
        label="excess of ω",
        title=f"{of}{population.name}, {side} side",
    )


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
    across = _across(values)
    if by_block or len({name.rpartition(".")[0] for name in values}) > 1:
        maps = [
            [
                plots.resolve_module_map(
                    _of_component(changes.values, component),
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
    pairs, populations = drawn_pairs(study), module_populations(study, "output")
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
