"""The figures of single adapters: their spectra, and what they do with W."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_analysis import plots
from lora_analysis.amplify import WeightBasisEnergy, weight_basis_energy
from lora_analysis.conclusions import number
from lora_analysis.conclusions.levels import SIDES_IN_ORDER
from lora_analysis.edit import error_by_parameters
from lora_analysis.effective import effective_update
from lora_analysis.errors import InputError
from lora_analysis.intruders import IntruderReport, intruder_dimensions
from lora_analysis.report.figures import ReportFigure
from lora_analysis.report.selection import short_name, telling_modules
from lora_analysis.spectra import singular_values, weight_svd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lora_analysis.studies import Study

# Beyond this smaller side, W's whole spectrum takes seconds: it is found where it was asked for.
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
    ranks = [int(rank_of[one.label, one.module]) for one in results]
    words = {
        "amplification_factor": (
            "Amplification factor by rank.",
            "‖ΔW‖/‖UᵀWV‖ along ΔW's own directions, one point a module of an adapter, all tasks; "
            "gray: what random directions of the same size would score (box: mean and spread of "
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
        spoken = f"{title} Median over all modules {number(float(full[value].median()))}."
        yield _figure(value, title, caption, spoken, axes)
    yield from _by_layer(study)


def _by_layer(study: Study) -> Iterator[ReportFigure]:
    """Yield both by layer, medians over the adapters of the rank that most have."""
    full = study.amplifications[study.amplifications["at_rank"]]
    full = full.merge(study.spectra[["adapter", "module", "rank"]], on=["adapter", "module"])
    if full["layer"].nunique() < 2:
        return
    rank = full["rank"].mode().iloc[0]
    own = full[full["rank"] == rank]
    medians = own.groupby("module", sort=False)[
        ["amplification_factor", "chance_factor", "enrichment"]
    ].median()
    of = f"medians over {own['adapter'].nunique()} adapter(s) of rank {rank}"
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
    """Yield ΔW's energy in W's basis, and intruder dimensions, where W's spectra are at hand."""
    if study.amplifications.empty:
        return
    energies = list(_energies(study))
    if energies:
        module = short_name(energies[0].module)
        for side in SIDES_IN_ORDER:
            axes = plots.plot_weight_energy(energies, plots.new_axes(), side=side)
            top = len(energies[0].S)
            spoken = "; ".join(
                f"{one.label}: {number(float(one.sides[side].leading[top - 1]))} in W's first {top}"
                for one in energies
            )
            yield _figure(
                f"energy_{side}",
                f"ΔW in W's basis, {module}, {side} side.",
                "Share of ‖ΔW‖² in W's leading k directions. Dashed: chance, k/d; gray: where 95 % "
                "of isotropic updates with such a spectrum stay (unrelated adapters need not).",
                f"Energy of ΔW in W's leading directions, {side} side. {spoken}.",
                axes,
            )
    reports = list(_intruders(study))
    if reports:
        for side in SIDES_IN_ORDER:
            count = sum(one.count(side) for one in reports)
            axes = plots.plot_intruders(
                reports, plots.new_axes(height=0.8 + 0.15 * len(reports)), side=side
            )
            yield _figure(
                f"intruders_{side}",
                f"Leading directions of W + ΔW, {reports[0].label}, {side} side.",
                "Brightness: the largest cosine with any of W's directions. A dot marks an "
                "intruder (below 0.5); a small one only mixes directions that W has.",
                f"{count} intruder dimensions in {len(reports)} modules, {side} side.",
                axes,
            )


def _quick(study: Study, module: str) -> bool:
    """Whether W's whole spectrum costs next to nothing, or was asked for."""
    own = study.spectra[study.spectra["module"] == module].iloc[0]
    return not study.changes.empty or min(own["d_out"], own["d_in"]) <= _QUICK_WEIGHT


def _energies(study: Study, limit: int = 5) -> Iterator[WeightBasisEnergy]:
    """Yield ΔW's energy for one telling module of one adapter of every task and rank."""
    known = study.amplifications
    module = telling_modules(list(dict.fromkeys(known["module"])), 1)[0]
    labels = one_per_rank(study, list(known.loc[known["module"] == module, "adapter"].unique()))
    if study.base is None or not _quick(study, module):
        return
    for label in labels[:limit]:
        update = study.adapters[label][module]
        try:
            weight = study.base.weight(_base_name(update, module), shape=update.shape)
        except InputError:
            return  # its orientation had to be told, or it is gone
        yield weight_basis_energy(update, weight_svd(weight))


def _intruders(study: Study) -> Iterator[IntruderReport]:
    """Yield the intruder dimensions of one adapter, module by module."""
    known = study.amplifications
    label = str(known["adapter"].iloc[0])
    modules = list(dict.fromkeys(known.loc[known["adapter"] == label, "module"]))
    step = -(-len(modules) // _INTRUDER_ROWS)
    for module in modules[::step]:
        if study.base is None or not _quick(study, module):
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
    """Yield the spectra and the energy of one telling module, and what fewer directions cost."""
    trained = study.spectra[study.spectra["numerical_rank"] > 0]
    if trained.empty:
        return
    module = telling_modules(list(dict.fromkeys(trained["module"])), 1)[0]
    labels = list(trained.loc[trained["module"] == module, "adapter"])
    chosen = one_per_rank(study, labels)[:limit] if len(labels) > limit else labels
    spectra = [study.spectrum(label, module) for label in chosen]
    yield _figure(
        "spectra",
        f"Singular values of ΔW, {short_name(module)}.",
        "Falling from the strongest direction; where a line ends, so does the numerical rank.",
        f"Singular values of {', '.join(chosen)} in {module}.",
        plots.plot_spectrum(spectra, plots.new_axes()),
    )
    ranks = "; ".join(f"{one.label}: {one.energy_rank(0.9)}" for one in spectra)
    yield _figure(
        "energy",
        f"Energy of ΔW, {short_name(module)}.",
        "Share of ‖ΔW‖² in the first i directions; lines at 90 % and 99 %.",
        f"Cumulated energy. Directions that hold 90 %: {ranks}.",
        plots.plot_spectrum(spectra, plots.new_axes(), energy=True),
    )
    yield from _budget(study, str(trained["adapter"].iloc[-1]))


def _budget(study: Study, label: str) -> Iterator[ReportFigure]:
    """Yield the error of a smaller copy of one adapter over its parameters."""
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
        f"What fewer directions cost, {label}.",
        "Relative error ‖ΔW − ΔW′‖/‖ΔW‖ over the parameters that are kept: the best choice of "
        "ranks, and one rank for all modules. It is about weights: what a task loses is to be "
        "measured on the task.",
        f"An error of a half is reached with {half:.0%} of the parameters.",
        plots.plot_budget({"ranks by energy": best, "one rank for all": same}, plots.new_axes()),
    )


def one_per_rank(study: Study, labels: list[str]) -> list[str]:
    """Return the first adapter of every task and rank, so that few lines show all kinds."""
    runs = study.runs[study.runs["adapter"].isin(labels)]
    return list(runs.drop_duplicates(["task", "rank"])["adapter"])
