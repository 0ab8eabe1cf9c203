"""One number per module: in groups, as strips of points against chance, or as sorted bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.patches import Rectangle

from lora_analysis.blocks import is_image, short_names
from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.labels import name_ticks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

# Of more modules, the largest and the smallest ones are drawn.
MOST_BARS = 24


@dataclass(frozen=True, slots=True, eq=False)
class ValueGroup:
    """Finite values of one group, in the given order, and how many were not finite."""

    label: str
    values: NDArray[np.float64]
    dropped: int

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile; NaN for an empty group."""
        if not self.values.size:
            return (np.nan, np.nan, np.nan)
        low, middle, high = np.quantile(self.values, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)

    @property
    def median(self) -> float:
        """The median; NaN for an empty group."""
        return self.quartiles[1]


def group(label: str, values: ArrayLike) -> ValueGroup:
    """Return a group of the finite values."""
    array = np.atleast_1d(np.asarray(values, dtype=np.float64)).ravel()
    finite = array[np.isfinite(array)]
    return ValueGroup(label, finite, array.size - finite.size)


def groups(values: Mapping[str, ArrayLike]) -> tuple[ValueGroup, ...]:
    """Return one group per entry, in the mapping's order."""
    return tuple(group(label, entry) for label, entry in values.items())


def dropped_note(all_groups: tuple[ValueGroup, ...]) -> str:
    """Return a note on the number of values that are not drawn; empty if there are none."""
    missing = sum(g.dropped for g in all_groups)
    total = missing + sum(len(g.values) for g in all_groups)
    return f"{missing} of {total} values are not finite and not drawn" if missing else ""


@dataclass(frozen=True, slots=True, eq=False)
class LevelsPlot:
    """Everything `plot_levels` shows: the first group on top, chance as a line."""

    groups: tuple[ValueGroup, ...]
    chance: float
    limits: tuple[float, float]
    xlabel: str
    note: str

    @property
    def heights(self) -> tuple[int, ...]:
        """Vertical position of each group."""
        return tuple(range(len(self.groups) - 1, -1, -1))


def resolve_levels(
    values: Mapping[str, ArrayLike], chance: float, *, xlabel: str = "φ(1, 1)"
) -> LevelsPlot:
    """Resolve the data that `plot_levels` draws."""
    if not values:
        message = "plot_levels was given no group of values."
        raise InputError(message)
    value_groups = groups(values)
    low = min((float(g.values.min()) for g in value_groups if g.values.size), default=0.0)
    high = max((float(g.values.max()) for g in value_groups if g.values.size), default=1.0)
    return LevelsPlot(
        groups=value_groups,
        chance=float(chance),
        limits=(min(0.0, low), max(1.0, high)),
        xlabel=xlabel,
        note=dropped_note(value_groups),
    )


def _paint_group(
    look: style.Look, plot: LevelsPlot, index: int, kwargs: dict[str, Any], *, numbers: bool
) -> None:
    ax, color = look.ax, look.color(index)
    group, y = plot.groups[index], plot.heights[index]
    ax.text(
        0,
        y + 0.3,
        f"{style.drawable_text(group.label, 60)}  (n = {len(group.values)})",
        transform=ax.get_yaxis_transform(),
        color=color,
        va="bottom",
        fontsize=look.small,
        parse_math=False,
        bbox={"facecolor": look.paper, "edgecolor": "none", "pad": 0.5},
    )
    if not group.values.size:
        return
    defaults = {
        "s": 9 * look.scale**2,
        "color": color,
        "alpha": 0.55,
        "linewidth": 0,
        "rasterized": len(group.values) > style.MANY_POINTS,
        "label": style.legend_label(group.label),
        "clip_on": False,
    }
    offsets = style.swarm(group.values, plot.limits, width=0.2)
    ax.scatter(group.values, y + offsets, **style.merge_kwargs(PathCollection, defaults, kwargs))
    low, middle, high = group.quartiles
    thin, thick = 1.2 * look.scale, 2 * look.scale
    ax.plot([low, high], [y, y], color=color, linewidth=thin, solid_capstyle="butt")
    ax.plot([middle, middle], [y - 0.26, y + 0.26], color=color, linewidth=thick)
    if not numbers:
        return
    ax.text(
        1.02,
        y,
        f"{round(middle, 3) + 0.0:.3f}" if middle < 0.1 else f"{middle:.2f}",
        color=color,
        va="center",
        transform=ax.get_yaxis_transform(),
        fontsize=8 * look.scale,
        fontweight="bold",
    )


def plot_levels(
    values: Mapping[str, ArrayLike],
    chance: float,
    ax: Axes | None = None,
    *,
    xlabel: str = "φ(1, 1)",
    numbers: bool = True,
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw one number per module in groups, one strip each, with the random baseline as a line.

    The pairs of interest (same task) come first, then the reference: other tasks with
    other seeds (the reference) and what cannot count (other tasks from the same initial A). A
    point is one module, a thin bar the quartiles, the thick mark and the number at the right
    the median.

    Parameters
    ----------
    values
        Group label to one number per module, in [0, 1] for φ; not-finite ones are counted below.
    chance
        The random baseline of the number, for φ(1, 1) that is 1/d.
    ax
        Axes to draw on; None makes a figure of one column's width.
    xlabel
        What the number is.
    numbers
        Whether to write the medians.
    color
        Color of the groups, or one per group; by default those of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``scatter`` for every group.

    Raises
    ------
    InputError
        No group, or a wrong color.
    """
    plot = resolve_levels(values, chance, xlabel=xlabel)
    size = (style.ONE_COLUMN, 0.65 + 0.5 * len(plot.groups))
    with style.drawing(ax, size, figsize=figsize, color=color) as look:
        ax = look.ax
        look.draw_baseline("x", plot.chance)
        ax.set_ylim(-0.5, len(plot.groups) - 0.2)
        ax.set_xlim(*plot.limits)
        for index in range(len(plot.groups)):
            _paint_group(look, plot, index, kwargs, numbers=numbers)
        ax.annotate(
            f"random {plot.chance:.2g}",
            (plot.chance, 1),
            xytext=(2, 1),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=look.small,
            color=look.muted,
        )
        if numbers:
            ax.annotate(
                "median",
                (1.02, 1),
                xytext=(0, 1),
                xycoords="axes fraction",
                fontsize=look.small,
                textcoords="offset points",
                color=look.muted,
            )
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        style.set_label(ax, "x", plot.xlabel if not plot.note else f"{plot.xlabel}\n{plot.note}")
    return ax


@dataclass(frozen=True, slots=True, eq=False)
class BarsPlot:
    """Data drawn by `plot_bars`.

    Attributes
    ----------
    labels, values
        The drawn modules in descending order.
    omitted
        Number of modules between the two parts, which are not drawn.
    first
        Number of bars in the first part.
    """

    labels: tuple[str, ...]
    values: NDArray[np.float64]
    omitted: int
    first: int
    xlabel: str

    @property
    def positions(self) -> NDArray[np.float64]:
        """Vertical position of each bar, with a gap between the parts."""
        positions = np.arange(len(self.values), dtype=np.float64)
        positions[self.first :] += 1.0 if self.omitted else 0.0
        return positions


def resolve_bars(values: Mapping[str, float], *, xlabel: str) -> BarsPlot:
    """Resolve the data that `plot_bars` draws."""
    finite = {name: float(value) for name, value in values.items() if np.isfinite(value)}
    if not finite:
        message = "plot_bars was given no finite value."
        raise InputError(message)
    names = list(finite)
    titles = short_names(names).values() if is_image(names) else style.without_common_start(names)
    labels = [style.drawable_text(title, 32) for title in titles]
    order = np.argsort(-np.array(list(finite.values())), kind="stable")
    omitted = max(0, len(order) - MOST_BARS)
    first = len(order) if not omitted else 2 * MOST_BARS // 3
    chosen = order if not omitted else np.concatenate([order[:first], order[first + omitted :]])
    return BarsPlot(
        labels=tuple(labels[index] for index in chosen),
        values=np.array([list(finite.values())[index] for index in chosen]),
        omitted=omitted,
        first=first,
        xlabel=xlabel,
    )


def plot_bars(
    values: Mapping[str, float],
    ax: Axes | None = None,
    *,
    xlabel: str,
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw one number per module as horizontal bars, the largest on top.

    Of more than `MOST_BARS` modules, the largest and the smallest ones are drawn, and the number of
    those between them is written.

    Parameters
    ----------
    values
        Module name to its number; modules without a finite one are left out.
    ax
        Axes to draw on; None creates a figure of one column's width.
    xlabel
        Name of the number.
    color
        Color of the bars; by default the first of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``barh``.

    Raises
    ------
    InputError
        No module has a finite value, or the color is wrong.
    """
    plot = resolve_bars(values, xlabel=xlabel)
    rows = len(plot.values) + bool(plot.omitted)
    size = (style.ONE_COLUMN, 0.6 + 0.14 * max(rows, 4))
    with style.drawing(ax, size, figsize=figsize, color=color) as look:
        ax = look.ax
        defaults = {"height": 0.7, "color": look.color(0)}
        ax.barh(plot.positions, plot.values, **style.merge_kwargs(Rectangle, defaults, kwargs))
        ax.set_ylim(plot.positions[-1] + 0.6, -0.6)
        name_ticks(ax, "y", plot.positions, plot.labels, fontsize=look.tiny)
        ax.set_xlim(0, float(plot.values.max()) * 1.02 or 1.0)
        if plot.omitted:
            ax.text(
                0.02,
                plot.first,
                f"… {plot.omitted} modules between …",
                transform=ax.get_yaxis_transform(),
                va="center",
                fontsize=look.tiny,
                color=look.muted,
            )
        style.set_label(ax, "x", plot.xlabel)
    return ax
