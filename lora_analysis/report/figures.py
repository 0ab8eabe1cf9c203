"""The figures of a report: which results are drawn, under which title and caption."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import plots
from lora_analysis.chance import excess
from lora_analysis.findings import level, number
from lora_analysis.plots.panels import SMALL_CHANCE
from lora_analysis.report.selection import (
    common_modules,
    rank_pair,
    seed_pair,
    short_name,
    telling_modules,
)
from lora_analysis.similarity import random_similarity
from lora_analysis.spectra import SIDES, Side
from lora_analysis.studies import REFERENCE, SHARED_SEED, Relation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_analysis.similarity import SimilarityGrid
    from lora_analysis.studies import Study

# Every figure a report may hold, by the name of its files.
NAMES = (
    "ranks_output", "ranks_input", "seeds_output", "seeds_input", "levels_output", "levels_input",
    "amplification_factor", "enrichment", "spectra",
)  # fmt: skip

_LEGEND = (
    "The bar at the colour scale spans isotropic chance; light lines mark directions whose "
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
    pair = rank_pair(study)
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
    pair = seed_pair(study)
    if pair is None:
        return
    a, b = pair
    for side in reversed(SIDES):
        grids = _named(study, a, b, side)
        first = next(iter(grids.values()))
        grids["random Gaussian"] = random_similarity(first.dimension, first.values.shape)
        yield ReportFigure(
            name=f"seeds_{side}",
            title=f"Two seeds, {side} side.",
            caption=(
                f"φ(i, j) between {a} and {b}, {_DIRECTIONS[side]} of ΔW, beside two random "
                f"matrices, laid out as Figure 4 of the LoRA paper. {_LEGEND}{_above(grids)}"
            ),
            alt=_spoken(grids, side),
            figure=plots.figure_seeds(grids),
        )


_GROUPS: dict[Relation, str] = {
    "same task, other rank": "same task, other rank",
    "same task, other rank and seed": "same task, other rank and seed",
    "same task, other seed": "same task, other seed",
    REFERENCE: "other task, other seed (reference)",
    SHARED_SEED: "other task, same seed (shared initial A)",
}


def level_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield φ(1, 1) of every pair and module by relation, beside chance, for either side."""
    table = study.similarities
    if table.empty or level(study.select(REFERENCE, "output")) is None:
        return
    for side in reversed(SIDES):
        own = table[(table["side"] == side) & (table["ill_defined_1_1"] == "")]
        above = own["dimension"].nunique() > 1  # then chance differs from module to module
        values = excess(own["phi_1_1"], own["chance_1_1"]) if above else own["phi_1_1"].to_numpy()
        groups = {
            label: values[own["relation"] == relation]
            for relation, label in _GROUPS.items()
            if (own["relation"] == relation).any()
        }
        chance = 0.0 if above else float(own["chance_1_1"].iloc[0])
        what = "φ(1,1) above chance" if above else "φ(1,1)"
        medians = "; ".join(
            f"{label}: median {number(float(np.median(v)))}" for label, v in groups.items()
        )
        axes = plots.plot_levels(groups, chance, plots.new_axes(), xlabel=f"{what}, {side} side")
        yield ReportFigure(
            name=f"levels_{side}",
            title=f"The first {side} direction, by relation.",
            caption=(
                "One point is one module of one pair, the bar the quartiles. A verdict compares a "
                "group with the reference; the line is isotropic chance."
                + (
                    " The last group shares its initial A: an artefact, largest in φ(r, r)."
                    if side == "input"
                    else ""
                )
            ),
            alt=f"{what} on the {side} side by relation of the pair. {medians}.",
            figure=axes.figure,  # type: ignore[arg-type]  # no sub-figures here
        )


def amplification_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield amplification factor and enrichment by rank, chance in both; nothing without W."""
    if study.amplifications.empty:
        return
    results = study.amplified()
    rank_of = study.spectra.set_index(["adapter", "module"])["rank"]
    ranks = [int(rank_of[one.label, one.module]) for one in results]
    words = {
        "amplification_factor": (
            "Amplification factor by rank.",
            "‖ΔW‖/‖UᵀWV‖ along ΔW's own directions, one point a module of an adapter, all tasks; "
            "grey: what random directions of the same size would score (box: mean and spread of "
            "draws).",
        ),
        "enrichment": (
            "Enrichment by rank.",
            "‖UᵀWV‖ along ΔW's directions over that along random ones: 1 means that W holds no "
            "more there than anywhere. A larger rank counts more and weaker directions.",
        ),
    }
    full = study.amplifications[study.amplifications["at_rank"]]
    for value, (title, caption) in words.items():
        axes = plots.plot_amplification(results, plots.new_axes(), value=value, ranks=ranks)  # type: ignore[arg-type]
        yield ReportFigure(
            name=value,
            title=title,
            caption=caption,
            alt=f"{title} Median over all modules {number(float(full[value].median()))}.",
            figure=axes.figure,  # type: ignore[arg-type]
        )


def spectrum_figures(study: Study, limit: int = 8) -> Iterator[ReportFigure]:
    """Yield the spectra of one telling module, one line per adapter (at most ``limit``)."""
    trained = study.spectra[study.spectra["numerical_rank"] > 0]
    if trained.empty:
        return
    module = telling_modules(list(dict.fromkeys(trained["module"])), 1)[0]
    labels = list(trained.loc[trained["module"] == module, "adapter"])
    chosen = _one_per_rank(study, labels)[:limit] if len(labels) > limit else labels
    axes = plots.plot_spectrum(
        [study.spectrum(label, module) for label in chosen], plots.new_axes()
    )
    yield ReportFigure(
        name="spectra",
        title=f"Singular values of ΔW, {short_name(module)}.",
        caption="Falling from the strongest direction; where a line ends, so does the rank.",
        alt=f"Singular values of {', '.join(chosen)} in {module}.",
        figure=axes.figure,  # type: ignore[arg-type]
    )


def _one_per_rank(study: Study, labels: list[str]) -> list[str]:
    """Return the first adapter of every task and rank, so that few lines show all kinds."""
    runs = study.runs[study.runs["adapter"].isin(labels)]
    return list(runs.drop_duplicates(["task", "rank"])["adapter"])
