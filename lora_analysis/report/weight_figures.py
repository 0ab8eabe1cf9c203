"""Figures of single adapters: spectra, amplification of W, energy in W's basis, intruders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_analysis import plots
from lora_analysis.amplify import WeightBasisEnergy, weight_basis_energy
from lora_analysis.conclusions.comparisons import SIDES_IN_ORDER
from lora_analysis.edit import error_by_parameters
from lora_analysis.effective import effective_update
from lora_analysis.errors import InputError
from lora_analysis.intruders import IntruderReport, intruder_dimensions
from lora_analysis.report.representatives import representative_modules, short_name
from lora_analysis.report.similarity_figures import ReportFigure
from lora_analysis.spectra import singular_values, weight_svd
from lora_analysis.text import number, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lora_analysis.studies import Study

# Beyond this smaller side, W's whole spectrum takes seconds: it is computed only on request.
_QUICK_WEIGHT = 1024
_INTRUDER_ROWS = 24


def _figure(name: str, title: str, caption: str, alt: str, axes: Axes) -> ReportFigure:
    return ReportFigure(name, title, caption, alt, axes.figure)  # type: ignore[arg-type]


def amplification_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield amplification factor and enrichment by rank and layer; nothing without W."""
    if study.amplifications.empty:
        return
    results = study.amplified()
    rank_of = study.spectra.set_index(["adapter", "module"])["rank"]
    ranks = [int(rank_of[result.label, result.module]) for result in results]
    captions = {
        "amplification_factor": (
            "Amplification factor by rank.",
            "‖ΔW‖/‖UᵀWV‖ along ΔW's own directions, one point per module and adapter, all tasks; "
            "gray: random directions of the same size (box: mean and spread of draws).",
        ),
        "enrichment": (
            "Enrichment by rank.",
            "‖UᵀWV‖ along ΔW's directions over that along random ones: 1 means that W is not "
            "stronger there than anywhere. A larger rank includes more and weaker directions.",
        ),
    }
    full = study.amplifications[study.amplifications["at_rank"]]
    for value, (title, caption) in captions.items():
        axes = plots.plot_amplification(results, plots.new_axes(), value=value, ranks=ranks)  # type: ignore[arg-type]
        alt = f"{title} Median over all modules {number(float(full[value].median()))}."
        yield _figure(value, title, caption, alt, axes)
    yield from _by_layer(study)


def _by_layer(study: Study) -> Iterator[ReportFigure]:
    """Yield both by layer: medians over the adapters of the most frequent rank."""
    full = study.amplifications[study.amplifications["at_rank"]]
    full = full.merge(study.spectra[["adapter", "module", "rank"]], on=["adapter", "module"])
    if full["layer"].nunique() < 2:
        return
    rank = full["rank"].mode().iloc[0]
    rows = full[full["rank"] == rank]
    medians = rows.groupby("module", sort=False)[
        ["amplification_factor", "chance_factor", "enrichment"]
    ].median()
    of = f"medians over {plural(rows['adapter'].nunique(), 'adapter')} of rank {rank}"
    factor = plots.plot_layers(
        medians["amplification_factor"].to_dict(),
        plots.new_axes(),
        ylabel="amplification ‖ΔW‖ / ‖UᵀWV‖",
        chance=medians["chance_factor"].to_dict(),
        log=True,
    )
    enrichment = plots.plot_layers(
        medians["enrichment"].to_dict(),
        plots.new_axes(),
        ylabel="enrichment ‖UᵀWV‖ / random",
        chance=1.0,
        log=True,
    )
    yield _figure(
        "amplification_layers",
        "Amplification factor by layer.",
        f"At full rank, {of}; gray: random directions of the same size.",
        f"Amplification factor by layer and type of module, {of}.",
        factor,
    )
    yield _figure(
        "enrichment_layers",
        "Enrichment by layer.",
        f"At full rank, {of}; dashed: random directions.",
        f"Enrichment by layer and type of module, {of}.",
        enrichment,
    )


def basis_figures(study: Study) -> Iterator[ReportFigure]:
    """Yield ΔW's energy in W's basis, and intruder dimensions, if W's spectra are cheap."""
    if study.amplifications.empty:
        return
    energies = list(_energies(study))
    if energies:
        module = short_name(energies[0].module)
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


def _energies(study: Study, limit: int = 5) -> Iterator[WeightBasisEnergy]:
    """Yield ΔW's energy for one representative module of one adapter of every task and rank."""
    table = study.amplifications
    module = representative_modules(list(dict.fromkeys(table["module"])), 1)[0]
    adapters = list(table.loc[table["module"] == module, "adapter"].unique())
    labels = one_per_task_and_rank(study, adapters)
    if study.base is None or not _is_quick(study, module):
        return
    for label in labels[:limit]:
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
    """Yield spectra and energy of one representative module, and the error of a reduced rank."""
    trained = study.spectra[study.spectra["numerical_rank"] > 0]
    if trained.empty:
        return
    module = representative_modules(list(dict.fromkeys(trained["module"])), 1)[0]
    labels = list(trained.loc[trained["module"] == module, "adapter"])
    chosen = one_per_task_and_rank(study, labels)[:limit] if len(labels) > limit else labels
    spectra = [study.spectrum(label, module) for label in chosen]
    yield _figure(
        "spectra",
        f"Singular values of ΔW, {short_name(module)}.",
        "In descending order; a line ends at the numerical rank.",
        f"Singular values of {', '.join(chosen)} in {module}.",
        plots.plot_spectrum(spectra, plots.new_axes()),
    )
    ranks = "; ".join(f"{spectrum.label}: {spectrum.energy_rank(0.9)}" for spectrum in spectra)
    yield _figure(
        "energy",
        f"Energy of ΔW, {short_name(module)}.",
        "Share of ‖ΔW‖² in the first i directions; lines at 90 % and 99 %.",
        f"Cumulative energy. Directions that hold 90 %: {ranks}.",
        plots.plot_spectrum(spectra, plots.new_axes(), energy=True),
    )
    yield from _budget(study, str(trained["adapter"].iloc[-1]))


def _budget(study: Study, label: str) -> Iterator[ReportFigure]:
    """Yield the error of reduced ranks of one adapter over the number of parameters."""
    if study.spectra.loc[study.spectra["adapter"] == label, "in_units_of_scale"].any():
        return
    values, costs = {}, {}
    for name, update in study.adapters[label].items():
        values[name] = singular_values(update)
        costs[name] = sum(update.shape)
    best = error_by_parameters(values, costs)
    same = error_by_parameters(values, costs, uniform=True)
    half = best[0][int((best[1] <= 0.5).argmax())] / best[0][-1]
    yield _figure(
        "budget",
        f"Error of a reduced rank, {label}.",
        "Relative error ‖ΔW − ΔW′‖/‖ΔW‖ over the number of parameters: with the best choice of "
        "ranks, and with one rank for all modules. This is the error of the weights; measure the "
        "loss in accuracy on the task.",
        f"An error of one half is reached with {half:.0%} of the parameters.",
        plots.plot_budget({"ranks by energy": best, "one rank for all": same}, plots.new_axes()),
    )


def one_per_task_and_rank(study: Study, labels: list[str]) -> list[str]:
    """Return the first adapter of every task and rank."""
    runs = study.runs[study.runs["adapter"].isin(labels)]
    return list(runs.drop_duplicates(["task", "rank"])["adapter"])
