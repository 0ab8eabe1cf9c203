"""Lines: a number over layers, training steps, parameters, or the leading directions of W."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_analysis.amplify import WeightBasisEnergy
from lora_analysis.blocks import locate_module
from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.labels import column_order, module_columns, name_ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from lora_analysis.spectra import Side

    _Series = Mapping[str, tuple[ArrayLike, ArrayLike]]


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One line: label, points, index of its color; None is a random baseline."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    color: int | None


@dataclass(frozen=True, slots=True, eq=False)
class LinesPlot:
    """Data of the plots. ``chance`` is a level or None; ``note`` names what is not drawn.

    ``blocks`` are the names at x = 0, 1, 2, … if these are not layers.
    """

    lines: tuple[Line, ...]
    xlabel: str
    ylabel: str
    limits: tuple[float, float]
    log: bool
    chance: float | None = None
    note: str = ""
    blocks: tuple[str, ...] = ()


def lines_of(series: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> tuple[Line, ...]:
    """Return one line per entry, sorted by x, without what is not finite."""
    made = []
    for index, (label, (x, y)) in enumerate(series.items()):
        xs, ys = (np.asarray(values, dtype=np.float64) for values in (x, y))
        order = np.argsort(xs, kind="stable")
        visible = order[np.isfinite(ys[order])]
        made.append(Line(style.drawable_text(label, 28), xs[visible], ys[visible], index))
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


def paint_lines(
    look: style.Look, lines: Sequence[Line], kwargs: dict[str, Any], *, marker: bool = False
) -> None:
    """Draw lines in their colors; ``kwargs`` go to ``plot``."""
    for line in lines:
        defaults = {
            "color": look.color(line.color),
            "marker": "o" if marker and len(line.x) <= 40 else "",
            "label": style.legend_label(line.label),
        }
        look.ax.plot(line.x, line.y, **style.merge_kwargs(Line2D, defaults, kwargs))


def _paint(look: style.Look, plot: LinesPlot, kwargs: dict[str, Any]) -> None:
    ax = look.ax
    if plot.chance is not None:
        look.draw_baseline("y", plot.chance)
    paint_lines(look, plot.lines, kwargs, marker=True)
    if plot.log:
        style.log_axis(ax, "y", plot.limits)
    else:
        ax.set_ylim(*plot.limits)
    ax.set_xlabel(plot.xlabel)
    ax.set_ylabel(plot.ylabel)
    ends = [line for line in plot.lines if line.y.size]
    if len(ends) > 1:
        look.name_ends(
            [(line.x[-1], line.y[-1]) for line in ends],
            [line.label for line in ends],
            [look.color(line.color) for line in ends],
        )
    if plot.note:
        ax.set_title(plot.note, fontsize=look.small, color=look.muted, loc="left", parse_math=False)


def _medians_by_layer(values: Mapping[str, float], kind_of: Callable[[str], str]) -> _Series:
    """Return per kind (positions of layers or blocks, medians over its modules there)."""
    columns = module_columns(values.keys())
    position = {column: i for i, column in enumerate(column_order(columns))}
    by_kind: dict[str, dict[int, list[float]]] = {}
    for name, column in columns.items():
        layers = by_kind.setdefault(kind_of(name), {})
        x = column if isinstance(column, int) else position[column]
        layers.setdefault(x, []).append(float(values[name]))
    return {
        kind: (list(layers), [float(np.median(values)) for values in layers.values()])
        for kind, layers in by_kind.items()
    }


def resolve_layers(
    values: Mapping[str, float],
    *,
    ylabel: str,
    chance: float | Mapping[str, float] | None = None,
    log: bool = False,
) -> LinesPlot:
    """Resolve the data that `plot_layers` draws."""
    if not len(values):  # a pandas Series has no truth of its own
        message = "plot_layers was given no module."
        raise InputError(message)
    lines = lines_of(_medians_by_layer(values, lambda name: locate_module(name).part))
    level = chance if isinstance(chance, float | int) else None
    if isinstance(chance, Mapping):
        random_layers = _medians_by_layer(chance, lambda _: "random directions")
        lines = (*lines, *(replace(line, color=None) for line in lines_of(random_layers)))
    columns = column_order(module_columns(values.keys()))
    blocks = tuple(column for column in columns if isinstance(column, str))
    xlabel = "block" if blocks else "layer"
    return LinesPlot(lines, xlabel, ylabel, _limits(lines, log=log), log, level, blocks=blocks)


def plot_layers(
    values: Mapping[str, float],
    ax: Axes | None = None,
    *,
    ylabel: str = "φ(1, 1)",
    chance: float | Mapping[str, float] | None = None,
    log: bool = False,
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw one number per module over the layers or blocks, one line per type of module.

    Parameters
    ----------
    values
        Module name to its number; several modules of a type in a layer count as their median.
    ax
        Axes to draw on; None makes a figure of one column's width.
    ylabel
        What the number is.
    chance
        What chance gives: a level, drawn dashed, or one number per module, drawn as a gray line
        of medians over the modules of a layer.
    log
        Whether the axis is logarithmic (factors and enrichment).
    color
        Color of the lines, or one per line; by default those of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``plot`` for every line.

    Raises
    ------
    InputError
        No module, or a wrong color.
    """
    plot = resolve_layers(values, ylabel=ylabel, chance=chance, log=log)
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        _paint(look, plot, kwargs)
        if plot.blocks:
            name_ticks(look.ax, "x", range(len(plot.blocks)), plot.blocks, vertical=None)
        else:
            look.ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return look.ax


def plot_trajectories(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Axes | None = None,
    *,
    ylabel: str = "ω with the last checkpoint",
    chance: float | None = None,
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a number over the steps of training, one line per run.

    Parameters
    ----------
    series
        Name of the run to (steps, values).
    ax
        Axes to draw on; None makes a figure of one column's width.
    ylabel
        What the number is.
    chance
        Its random baseline, as a dashed line.
    color, figsize, **kwargs
        As in `plot_layers`.

    Raises
    ------
    InputError
        No run, or a wrong color.
    """
    if not series:
        message = "plot_trajectories was given no run."
        raise InputError(message)
    lines = lines_of(series)
    plot = LinesPlot(lines, "training step", ylabel, _limits(lines, log=False), False, chance)
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        _paint(look, plot, kwargs)
    return look.ax


def plot_budget(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Axes | None = None,
    *,
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the relative error ‖ΔW − ΔW′‖/‖ΔW‖ of a smaller adapter over its parameters.

    Parameters
    ----------
    curves
        Name to (parameters, error), from `lora_analysis.edit.error_by_parameters`.
    ax
        Axes to draw on; None makes a figure of one column's width.
    color, figsize, **kwargs
        As in `plot_layers`.

    Raises
    ------
    InputError
        No curve, or a wrong color.
    """
    if not curves:
        message = "plot_budget was given no curve."
        raise InputError(message)
    lines = lines_of(curves)
    plot = LinesPlot(lines, "parameters", "relative error of ΔW", (0.0, 1.02), False)
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        ax = look.ax
        paint_lines(look, lines, kwargs)
        low = min((float(line.x.min()) for line in lines if line.x.size), default=1.0)
        high = max((float(line.x.max()) for line in lines if line.x.size), default=10.0)
        style.log_axis(ax, "x", (low / 1.1, high * 1.1))
        ax.xaxis.set_major_formatter(lambda value, _: _thousands(value))
        ax.set_ylim(*plot.limits)
        ax.set_xlabel(plot.xlabel)
        ax.set_ylabel(plot.ylabel)
        ax.legend(loc="lower left")
    return ax


def _thousands(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


@dataclass(frozen=True, slots=True, eq=False)
class EnergyPlot:
    """Data drawn by `plot_weight_energy`: cumulated shares over k, chance and its 95 % bound."""

    lines: tuple[Line, ...]
    k: NDArray[np.float64]
    chance: NDArray[np.float64]
    bound: NDArray[np.float64]
    xlabel: str
    ylabel: str


def resolve_weight_energy(energies: Sequence[WeightBasisEnergy], *, side: Side) -> EnergyPlot:
    """Resolve the data that `plot_weight_energy` draws."""
    if not energies:
        message = "plot_weight_energy was given no result."
        raise InputError(message)
    sizes = {(len(energy.weight_values), energy.sides[side].dimension) for energy in energies}
    if len(sizes) > 1:
        message = f"The weights have {len(sizes)} sizes; draw those of one size together."
        raise InputError(message)
    ((count, dimension),) = sizes
    k = np.arange(1, count + 1, dtype=np.float64)
    labels = [energy.label for energy in energies]
    names = labels if len(set(labels)) == len(energies) else [energy.module for energy in energies]
    names = style.without_common_start(names)
    lines = lines_of(
        {
            name: (k, energy.sides[side].leading)
            for name, energy in zip(names, energies, strict=True)
        }
    )
    # The fewest effective directions vary most: their bound holds for all.
    bound = np.max([energy.band(side, 0.95) for energy in energies], axis=0)
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
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the share of ‖ΔW‖² in W's top-k directions over k, next to what random ones hold.

    Dashed: chance, k/d; gray up to where 95 % of isotropic updates of such a spectrum stay. The
    LoRA paper's Figure 8 is a part of it.

    Parameters
    ----------
    energies
        From `lora_analysis.amplify.weight_basis_energy`; several of one size.
    ax
        Axes to draw on; None makes a figure of one column's width.
    side
        ``"input"`` or ``"output"``.
    color
        Color of the curves, or one per curve; by default those of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``plot`` for every curve.

    Raises
    ------
    InputError
        No result, weights of several sizes, or a wrong color.
    """
    several = [energies] if isinstance(energies, WeightBasisEnergy) else list(energies)
    plot = resolve_weight_energy(several, side=side)
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        ax = look.ax
        ax.fill_between(plot.k, 0, plot.bound, color=look.muted, alpha=0.18, linewidth=0)
        ax.plot(plot.k, plot.chance, color=look.muted, linestyle=(0, (4, 2)), label="random")
        paint_lines(look, plot.lines, kwargs)
        style.log_axis(ax, "x", (0.9, float(plot.k[-1]) * 1.05), base=2)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel(plot.xlabel)
        ax.set_ylabel(plot.ylabel)
        # All lines end at 1: they are named where they differ, in a legend.
        ax.legend(loc="upper left", handlelength=1.2)
    return ax
