"""Lines: a number over layers, over W's directions, over training steps, over parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from lora_analysis.errors import InputError
from lora_analysis.patterns import layer_index, module_type
from lora_analysis.plots import style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from lora_analysis.amplify import WeightBasisEnergy
    from lora_analysis.spectra import Side

    _Series = Mapping[str, tuple[ArrayLike, ArrayLike]]


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One line: what it is called, where it goes, in which colour."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    colour: str


@dataclass(frozen=True, slots=True, eq=False)
class LinesPlot:
    """What the plots here show. ``chance`` is a level or None; ``note`` says what is not drawn."""

    lines: tuple[Line, ...]
    xlabel: str
    ylabel: str
    limits: tuple[float, float]
    log: bool
    chance: float | None = None
    note: str = ""


def _lines(series: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> tuple[Line, ...]:
    made = []
    for at, (label, (x, y)) in enumerate(series.items()):
        xs, ys = (np.asarray(one, dtype=np.float64) for one in (x, y))
        order = np.argsort(xs, kind="stable")
        kept = order[np.isfinite(ys[order])]
        colour = style.PALETTE[at % len(style.PALETTE)]
        made.append(Line(style.plain(label, 28), xs[kept], ys[kept], colour))
    return tuple(made)


def _limits(lines: Sequence[Line], *, log: bool) -> tuple[float, float]:
    values = np.concatenate([np.empty(0), *(line.y for line in lines)])
    if log:
        values = values[values > 0]
        low, high = (values.min(), values.max()) if values.size else (0.5, 2.0)
        low, high = min(float(low), 1.0), max(float(high), 1.0)
        return low / 1.2, high * 1.25
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    return min(0.0, float(low)) * 1.05, max(1.0, float(high)) * 1.04


def _paint(ax: Axes, plot: LinesPlot, *, marker: bool) -> None:
    if plot.chance is not None:
        ax.axhline(plot.chance, color=style.QUIET, linewidth=0.9, linestyle=(0, (4, 2)), zorder=0)
    for line in plot.lines:
        ax.plot(
            line.x,
            line.y,
            color=line.colour,
            marker="o" if marker and len(line.x) <= 40 else "",
            label=style.legend_label(line.label),
        )
    if plot.log:
        style.log_axis(ax, "y", plot.limits)
    else:
        ax.set_ylim(*plot.limits)
    ax.set_xlabel(plot.xlabel)
    ax.set_ylabel(plot.ylabel)
    name_lines(ax, [line for line in plot.lines if line.y.size])
    if plot.note:
        ax.set_title(plot.note, fontsize=7, color=style.QUIET, loc="left", parse_math=False)


def name_lines(ax: Axes, lines: Sequence[Line]) -> None:
    """Write the lines' names at the right of the axes, in their colour, where they end."""
    if len(lines) < 2:
        return
    ends = [(line.x[-1], line.y[-1]) for line in lines]
    heights = (ax.transScale + ax.transLimits).transform(ends)[:, 1]
    gap = 9.5 / ax.bbox.height * ax.figure.dpi / 72
    for line, y in zip(lines, style.apart(heights, gap, (0.0, 1.0)), strict=True):
        ax.text(
            1.03, y, line.label, transform=ax.transAxes, color=line.colour, va="center",
            fontsize=7, parse_math=False,
        )  # fmt: skip


def _by_layer(values: Mapping[str, float], kind_of: Callable[[str], str]) -> _Series:
    """Return per kind (layers, medians over its modules there)."""
    by_kind: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        layers = by_kind.setdefault(kind_of(name), {})
        layers.setdefault(layer_index(name) or 0, []).append(float(value))
    return {
        kind: (list(layers), [float(np.median(own)) for own in layers.values()])
        for kind, layers in by_kind.items()
    }


def resolve_layers(
    values: Mapping[str, float],
    *,
    ylabel: str,
    chance: float | Mapping[str, float] | None = None,
    log: bool = False,
) -> LinesPlot:
    """Return what `plot_layers` draws, as plain attributes."""
    if not values:
        message = "plot_layers was given no module."
        raise InputError(message)
    lines = _lines(_by_layer(values, module_type))
    level = chance if isinstance(chance, float | int) else None
    if isinstance(chance, Mapping):
        found = _by_layer(chance, lambda _: "random directions")
        lines = (*lines, *(replace(one, colour=style.QUIET) for one in _lines(found)))
    return LinesPlot(lines, "layer", ylabel, _limits(lines, log=log), log, level)


def plot_layers(
    values: Mapping[str, float],
    ax: Axes | None = None,
    *,
    ylabel: str = "φ(1, 1)",
    chance: float | Mapping[str, float] | None = None,
    log: bool = False,
) -> Axes:
    """Draw one number per module over the layers, one line per type of module.

    Parameters
    ----------
    values
        Module name to its number; several modules of a type in a layer count as their median.
    ax
        Where to draw; None makes a figure of one column's width.
    ylabel
        What the number is.
    chance
        What chance gives: a level, drawn dashed, or one number per module, drawn as a grey line
        of medians over the modules of a layer.
    log
        Whether the axis is logarithmic (factors and enrichment).

    Raises
    ------
    InputError
        No module.
    """
    plot = resolve_layers(values, ylabel=ylabel, chance=chance, log=log)
    with style.house_style():
        ax = style.axes_or_new(ax, (style.ONE_COLUMN, 2.4))
        _paint(ax, plot, marker=True)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return ax


@dataclass(frozen=True, slots=True, eq=False)
class EnergyPlot:
    """What `plot_weight_energy` shows: cumulated shares over k, chance and its 95 % bound."""

    lines: tuple[Line, ...]
    k: NDArray[np.float64]
    chance: NDArray[np.float64]
    bound: NDArray[np.float64]
    xlabel: str
    ylabel: str


def resolve_weight_energy(
    energies: Sequence[WeightBasisEnergy], *, side: Side = "output"
) -> EnergyPlot:
    """Return what `plot_weight_energy` draws, as plain attributes."""
    if not energies:
        message = "plot_weight_energy was given no result."
        raise InputError(message)
    sizes = {(len(one.weight_values), one.sides[side].dimension) for one in energies}
    if len(sizes) > 1:
        message = f"The weights have {len(sizes)} sizes; draw those of one size together."
        raise InputError(message)
    ((count, dimension),) = sizes
    k = np.arange(1, count + 1, dtype=np.float64)
    labels = [one.label for one in energies]
    names = labels if len(set(labels)) == len(energies) else [one.module for one in energies]
    names = style.without_common_start(names)
    lines = _lines(
        {name: (k, one.sides[side].leading) for name, one in zip(names, energies, strict=True)}
    )
    # The fewest effective directions vary most: their bound holds for all.
    bound = np.max([one.band(side, 0.95) for one in energies], axis=0)
    return EnergyPlot(
        lines=lines,
        k=k,
        chance=k / dimension,
        bound=bound,
        xlabel="k, leading directions of W",
        ylabel=f"share of ‖ΔW‖², {side} side",
    )


def plot_weight_energy(
    energies: WeightBasisEnergy | Sequence[WeightBasisEnergy],
    ax: Axes | None = None,
    *,
    side: Side = "output",
) -> Axes:
    """Draw the share of ‖ΔW‖² in W's top-k directions over k, beside what random ones hold.

    Dashed: chance, k/d; grey up to where 95 % of isotropic updates of such a spectrum stay. The
    LoRA paper's Figure 8 is a part of it.

    Parameters
    ----------
    energies
        From `lora_analysis.amplify.weight_basis_energy`; several of one size.
    ax
        Where to draw; None makes a figure of one column's width.
    side
        ``"input"`` or ``"output"``.

    Raises
    ------
    InputError
        No result, or weights of several sizes.
    """
    from lora_analysis.amplify import WeightBasisEnergy as One

    several = [energies] if isinstance(energies, One) else list(energies)
    plot = resolve_weight_energy(several, side=side)
    with style.house_style():
        ax = style.axes_or_new(ax, (style.ONE_COLUMN, 2.4))
        ax.fill_between(plot.k, 0, plot.bound, color=style.QUIET, alpha=0.18, linewidth=0)
        ax.plot(plot.k, plot.chance, color=style.QUIET, linestyle=(0, (4, 2)), label="chance")
        for line in plot.lines:
            ax.plot(line.x, line.y, color=line.colour, label=style.legend_label(line.label))
        style.log_axis(ax, "x", (0.9, float(plot.k[-1]) * 1.05), base=2)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel(plot.xlabel)
        ax.set_ylabel(plot.ylabel)
        # All lines end at 1: they are named where they differ, in a legend.
        ax.legend(fontsize=7, frameon=False, loc="upper left", handlelength=1.2)
    return ax


def plot_trajectories(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Axes | None = None,
    *,
    ylabel: str = "ω with the last checkpoint",
    chance: float | None = None,
) -> Axes:
    """Draw a number over the steps of training, one line per run.

    Parameters
    ----------
    series
        Name of the run to (steps, values).
    ax
        Where to draw; None makes a figure of one column's width.
    ylabel
        What the number is.
    chance
        Its isotropic chance, as a dashed line.

    Raises
    ------
    InputError
        No run.
    """
    if not series:
        message = "plot_trajectories was given no run."
        raise InputError(message)
    lines = _lines(series)
    plot = LinesPlot(lines, "training step", ylabel, _limits(lines, log=False), False, chance)
    with style.house_style():
        ax = style.axes_or_new(ax, (style.ONE_COLUMN, 2.4))
        _paint(ax, plot, marker=True)
    return ax


def plot_budget(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Axes | None = None,
) -> Axes:
    """Draw the relative error ‖ΔW − ΔW′‖/‖ΔW‖ of a smaller adapter over its parameters.

    Parameters
    ----------
    curves
        Name to (parameters, error), from `lora_analysis.edit.error_by_parameters`.
    ax
        Where to draw; None makes a figure of one column's width.

    Raises
    ------
    InputError
        No curve.
    """
    if not curves:
        message = "plot_budget was given no curve."
        raise InputError(message)
    lines = _lines(curves)
    plot = LinesPlot(lines, "parameters", "relative error of ΔW", (0.0, 1.02), False)
    with style.house_style():
        ax = style.axes_or_new(ax, (style.ONE_COLUMN, 2.4))
        for line in lines:
            ax.plot(line.x, line.y, color=line.colour, label=style.legend_label(line.label))
        low = min((float(line.x.min()) for line in lines if line.x.size), default=1.0)
        high = max((float(line.x.max()) for line in lines if line.x.size), default=10.0)
        style.log_axis(ax, "x", (low / 1.1, high * 1.1))
        ax.xaxis.set_major_formatter(lambda value, _: _thousands(value))
        ax.set_ylim(*plot.limits)
        ax.set_xlabel(plot.xlabel)
        ax.set_ylabel(plot.ylabel)
        ax.legend(fontsize=7, frameon=False, loc="lower left")
    return ax


def _thousands(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
