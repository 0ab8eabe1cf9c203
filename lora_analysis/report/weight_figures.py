"""Figures of single adapters: spectra, amplification of W, energy in W's basis, intruders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis import plots
from lora_analysis.amplify import WeightBasisEnergy, weight_basis_energy
from lora_analysis.blocks import locate_module
from lora_analysis.conclusions.comparison_values import SIDES_IN_ORDER
from lora_analysis.conclusions.weight_findings import tasks_of_all_ranks, with_ranks
from lora_analysis.effective import effective_update
from lora_analysis.errors import InputError
from lora_analysis.intruders import IntruderReport, intruder_dimensions
from lora_analysis.report.representatives import module_titles, representative_modules
from lora_analysis.report.similarity_figures import ReportFigure
from lora_analysis.spectra import weight_svd
from lora_analysis.text import join_names, number, plural

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from lora_analysis.studies import Study

# Beyond this smaller side, W's whole spectrum takes seconds: it is computed only on request.
_QUICK_WEIGHT = 1024
_INTRUDER_ROWS = 24
# Adapters whose energy in W's basis is drawn.
_MOST_ENERGIES = 5


def _figure(name: str, title: str, caption: str, alt: str, axes: Axes) -> ReportFigure:
    return ReportFigure(name, title, caption, alt, axes.figure)  # type: ignore[arg-type]


_CONTROLS: Final = {
    "enrichment": "ΔW’s directions",
    "enrichment_crossed": "crossed with an unrelated update",
    "enrichment_through_weight": "random vectors through W",
}


def amplification_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield the enrichment by rank, with its controls if there are some, and by layer."""
    table = with_ranks(study)
    if table.empty:
        return
    rows, tasks = tasks_of_all_ranks(study, table[table["at_rank"]])
    of = f" of {join_names(tasks)}" if tasks else ""
    rank_of = {(row.adapter, row.module): int(row.rank) for row in rows.itertuples()}
    results = [r for r in study.amplified() if (r.label, r.module) in rank_of]
    axes = plots.plot_amplification(
        results,
        plots.new_axes(),
        value="enrichment",
        ranks=[rank_of[result.label, result.module] for result in results],
    )
    medians = "; ".join(
        f"rank {int(rank)}: median {number(float(of_rank['enrichment'].median()))}"
        for rank, of_rank in rows.groupby("rank")
    )
    yield _figure(
        "enrichment",
        "Enrichment by rank.",
        f"‖UᵀWV‖ along ΔW’s directions over that along random ones, a point per module and "
        f"adapter{of}: 1 means that W is not stronger there than anywhere.",
        f"Enrichment by rank. {medians}.",
        axes,
    )
    present = [name for name in _CONTROLS if rows[name].notna().any()]
    complete = rows.dropna(subset=present)  # the same updates in every group
    controls = {_CONTROLS[name]: complete[name].to_numpy(dtype=float) for name in present}
    if len(controls) > 1 and len(complete):
        yield _figure(
            "enrichment_controls",
            "Enrichment and its controls.",
            f"Updates of rank {join_names([str(int(r)) for r in sorted(set(complete['rank']))])}"
            f"{of}, which have every control: what directions that know nothing of an update reach "
            "is not specific to it.",
            "Enrichment next to its controls. "
            + "; ".join(f"{k}: median {number(float(np.median(v)))}" for k, v in controls.items())
            + ".",
            plots.plot_levels(
                controls,
                1.0,
                plots.new_axes(height=0.75 + 0.42 * len(controls)),
                xlabel="enrichment",
            ),
        )
    yield from _by_layer(rows)


def _by_layer(full: pd.DataFrame) -> Iterator[ReportFigure]:
    """Yield the enrichment by layer: medians over the adapters of the most frequent rank."""
    if len({locate_module(module)[:2] for module in full["module"]}) < 2:  # component and block
        return
    rank = int(full["rank"].mode().iloc[0])
    rows = full[full["rank"] == rank]
    medians = rows.groupby("module", sort=False)["enrichment"].median()
    of = f"medians over {plural(rows['adapter'].nunique(), 'adapter')} of rank {rank}"
    yield _figure(
        "enrichment_layers",
        "Enrichment by layer.",
        f"At full rank, {of}; dashed: random directions.",
        f"Enrichment by layer and type of module, {of}.",
        plots.plot_layers(
            medians.to_dict(),
            plots.new_axes(),
            ylabel="enrichment ‖UᵀWV‖ / random",
            chance=1.0,
            log=True,
        ),
    )


def basis_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield ΔW's energy in W's basis, and intruder dimensions, if W's spectra are cheap."""
    if study.amplifications.empty:
        return
    energies = list(_energies(study))
    if energies:
        module = module_titles(study)[energies[0].module]
        for side in SIDES_IN_ORDER:
            axes = plots.plot_weight_energy(energies, plots.new_axes(), side=side)
            top = len(energies[0].S)
            shares = "; ".join(
                f"{energy.label}: {number(float(energy.sides[side].leading[top - 1]))}"
                for energy in energies
            )
            yield _figure(
                f"energy_{side}",
                f"ΔW in W's basis, {module}, {side} side.",
                "Share of ‖ΔW‖² in W's leading k directions. Dashed: random baseline, k/d; gray: "
                "95 % of random updates with such a spectrum (unrelated adapters can be outside).",
                f"Energy of ΔW in W's leading {top} directions, {side} side. {shares}.",
                axes,
            )
    reports = list(_intruders(study))
    if reports:
        for side in SIDES_IN_ORDER:
            count = sum(report.count(side) for report in reports)
            axes = plots.plot_intruders(
                reports, plots.new_axes(height=0.8 + 0.15 * len(reports)), side=side
            )
            yield _figure(
                f"intruders_{side}",
                f"Leading directions of W + ΔW, {reports[0].label}, {side} side.",
                "Brightness: the largest cosine with any of W's directions. A dot marks an "
                "intruder (below 0.5); a small dot only mixes directions that W has.",
                f"{count} intruder dimensions in {len(reports)} modules, {side} side.",
                axes,
            )


def _is_quick(study: Study, module: str) -> bool:
    """Return True if W's whole spectrum costs next to nothing, or was requested."""
    row = study.spectra[study.spectra["module"] == module].iloc[0]
    return not study.changes.empty or min(row["d_out"], row["d_in"]) <= _QUICK_WEIGHT


def _energies(study: Study) -> Iterator[WeightBasisEnergy]:
    """Yield ΔW's energy for one representative module of one adapter of every task and rank."""
    table = study.amplifications
    module = representative_modules(list(dict.fromkeys(table["module"])), 1)[0]
    adapters = list(table.loc[table["module"] == module, "adapter"].unique())
    labels = one_per_task_and_rank(study, adapters)
    if study.base is None or not _is_quick(study, module):
        return
    for label in labels[:_MOST_ENERGIES]:
        update = study.adapters[label][module]
        try:
            weight = study.base.weight(_base_name(update, module), shape=update.shape)
        except InputError:
            return  # its orientation has to be given, or it is gone
        yield weight_basis_energy(update, weight_svd(weight))


def _intruders(study: Study) -> Iterator[IntruderReport]:
    """Yield the intruder dimensions of one adapter, module by module."""
    table = study.amplifications
    label = str(table["adapter"].iloc[0])
    modules = list(dict.fromkeys(table.loc[table["adapter"] == label, "module"]))
    step = -(-len(modules) // _INTRUDER_ROWS)
    for module in modules[::step]:
        if study.base is None or not _is_quick(study, module):
            return
        update = study.adapters[label][module]
        try:
            weight = study.base.weight(_base_name(update, module), shape=update.shape)
            yield intruder_dimensions(effective_update(update, weight), weight)
        except InputError:
            return


def _base_name(update: object, module: str) -> str:
    return getattr(update, "base_name", "") or module


def spectrum_figures(study: Study, limit: int = 7) -> Iterator[ReportFigure]:
    """Yield the share of ‖ΔW‖² in the first directions of one representative module."""
    trained = study.spectra[study.spectra["numerical_rank"] > 0]
    if trained.empty:
        return
    module = representative_modules(list(dict.fromkeys(trained["module"])), 1)[0]
    labels = list(trained.loc[trained["module"] == module, "adapter"])
    chosen = one_per_task_and_rank(study, labels)[:limit] if len(labels) > limit else labels
    spectra = [study.spectrum(label, module) for label in chosen]
    ranks = "; ".join(f"{spectrum.label}: {spectrum.energy_rank(0.9)}" for spectrum in spectra)
    yield _figure(
        "energy",
        f"Energy of ΔW, {module_titles(study)[module]}.",
        "Share of ‖ΔW‖² in the first i directions of one module; lines at 90 % and 99 %.",
        f"Cumulative energy. Directions that hold 90 %: {ranks}.",
        plots.plot_spectrum(spectra, plots.new_axes(), energy=True),
    )


def one_per_task_and_rank(study: Study, labels: list[str]) -> list[str]:
    """Return the first adapter of every task and rank."""
    runs = study.runs[study.runs["adapter"].isin(labels)]
    return list(runs.drop_duplicates(["task", "rank"])["adapter"])
