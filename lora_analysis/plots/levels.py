"""One number per module in several groups, against chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.points import Group, dropped_note, groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True, eq=False)
class LevelsPlot:
    """Everything `plot_levels` shows: the first group on top, chance as a line."""

    groups: tuple[Group, ...]
    colors: tuple[str, ...]
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
        colors=tuple(style.PALETTE[n % len(style.PALETTE)] for n in range(len(value_groups))),
        chance=float(chance),
        limits=(min(0.0, low), max(1.0, high)),
        xlabel=xlabel,
        note=dropped_note(value_groups),
    )


def _paint_group(
    ax: Axes,
    group: Group,
    y: float,
    color: str,
    span: tuple[float, float],
    *,
    numbers: bool,
) -> None:
    ax.text(
        0,
        y + 0.3,
        f"{style.plain(group.label, 60)}  (n = {len(group.values)})",
        transform=ax.get_yaxis_transform(),
        color=color,
        va="bottom",
        fontsize=7,
        parse_math=False,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
    if not group.values.size:
        return
    offsets = style.swarm(group.values, span, width=0.2)
    ax.scatter(
        group.values,
        y + offsets,
        s=9,
        color=color,
        alpha=0.55,
        linewidth=0,
        rasterized=len(group.values) > style.MANY_POINTS,
        label=style.legend_label(group.label),
        clip_on=False,
    )
    low, middle, high = group.quartiles
    ax.plot([low, high], [y, y], color=color, linewidth=1.2, solid_capstyle="butt")
    ax.plot([middle, middle], [y - 0.26, y + 0.26], color=color, linewidth=2)
    if not numbers:
        return
    ax.text(
        1.02,
        y,
        f"{round(middle, 3) + 0.0:.3f}" if middle < 0.1 else f"{middle:.2f}",
        color=color,
        va="center",
        transform=ax.get_yaxis_transform(),
        fontsize=8,
        fontweight="bold",
    )


def plot_levels(
    values: Mapping[str, ArrayLike],
    chance: float,
    ax: Axes | None = None,
    *,
    xlabel: str = "φ(1, 1)",
    numbers: bool = True,
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
        If to draw; None makes a figure of one column's width.
    xlabel
        What the number is.
    numbers
        Whether to write the medians.

    Raises
    ------
    InputError
        No group.
    """
    plot = resolve_levels(values, chance, xlabel=xlabel)
    with style.house_style():
        ax = style.axes_or_new(ax, (style.ONE_COLUMN, 0.65 + 0.5 * len(plot.groups)))
        ax.axvline(plot.chance, color=style.QUIET, linewidth=0.9, linestyle=(0, (4, 2)), zorder=0)
        ax.set_ylim(-0.5, len(plot.groups) - 0.2)
        ax.set_xlim(*plot.limits)
        for group, y, color in zip(plot.groups, plot.heights, plot.colors, strict=True):
            _paint_group(ax, group, y, color, plot.limits, numbers=numbers)
        ax.annotate(
            f"random {plot.chance:.2g}",
            (plot.chance, 1),
            xytext=(2, 1),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=7,
            color=style.QUIET,
        )
        if numbers:
            ax.annotate(
                "median",
                (1.02, 1),
                xytext=(0, 1),
                xycoords="axes fraction",
                fontsize=7,
                textcoords="offset points",
                color=style.QUIET,
            )
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        style.set_label(ax, "x", plot.xlabel if not plot.note else f"{plot.xlabel}\n{plot.note}")
    return ax
