"""One number per module as sorted bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Rectangle

from lora_analysis.blocks import is_image, short_names
from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.labels import name_ticks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Of more modules, the largest and the smallest ones are drawn.
MOST_BARS = 24


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
    labels = [style.plain(title, 32) for title in titles]
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
        ax.barh(plot.positions, plot.values, **style.merged(Rectangle, defaults, kwargs))
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
