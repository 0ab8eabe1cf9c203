"""The group analysis: energy that common parts hold, over the number of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.studies.group_shares import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lora_analysis.studies import GroupAnalysis

_NAMES = {
    "mean": "mean",
    "matrices": "{k} matrices",
    "matrices_beyond_mean": "{k} matrices\nbeyond the mean",
    "directions": "{k} directions,\nboth sides",
    "input": "{k} directions,\ninput side",
    "output": "{k} directions,\noutput side",
}


@dataclass(frozen=True, slots=True, eq=False)
class GroupPart:
    """One part over the sizes: the members' line, and the bands of both nulls ``(2, S)``."""

    label: str
    shares: NDArray[np.float64]
    random: NDArray[np.float64]
    others: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlot:
    """Everything `plot_group` shows."""

    sizes: NDArray[np.float64]
    parts: tuple[GroupPart, ...]
    expected_mean: NDArray[np.float64]
    limits: tuple[float, float]


def resolve_group(analysis: GroupAnalysis, *, part: str = "directions") -> GroupPlot:
    """Resolve the data that `plot_group` draws."""
    if part not in PARTS[1:]:
        message = f"part must be one of {', '.join(PARTS[1:])}, got {part!r}."
        raise InputError(message)
    parts = []
    for name in ("mean", part):
        p = PARTS.index(name)
        # The largest size has the limit; at the others random directions vary as much.
        room = analysis.chance_limit[p] - analysis.chance[p, -1]
        low = np.maximum(analysis.chance[p] - room, -1.0 if name == "mean" else 0.0)
        parts.append(
            GroupPart(
                _NAMES[name].format(k=analysis.k),
                analysis.shares[p],
                np.stack([low, analysis.chance[p] + room]),
                analysis.others_range[:, p],
            )
        )
    drawn = np.concatenate([np.ravel(a) for p in parts for a in (p.shares, p.random, p.others)])
    drawn = drawn[np.isfinite(drawn)]
    high = max(float(drawn.max(initial=0.0)), 0.1)
    return GroupPlot(
        sizes=np.array(analysis.sizes, dtype=np.float64),
        parts=tuple(parts),
        expected_mean=analysis.expected_mean,
        limits=(min(0.0, 1.1 * float(drawn.min(initial=0.0))), min(1.1 * high, 1.04)),
    )


def plot_group(
    analysis: GroupAnalysis,
    ax: Axes | None = None,
    *,
    part: str = "directions",
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the energy that the mean and another common part hold, over the number of adapters.

    A line is the mean share of the members outside a basis of that many others. Bands are the
    nulls: gray for random directions of the same spectra (95 %), in the color of the line from the
    smallest to the largest share of adapters of other groups. The dotted line is the share of the
    mean that follows from the mean cosine of two members.

    Parameters
    ----------
    analysis
        From `Study.group_analysis`.
    ax
        Axes to draw on; None makes a figure of one column's width.
    part
        What is drawn next to the mean: any other of ``analysis.parts``.
    color
        Color of the lines, or one per line; by default those of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``plot`` for both lines.

    Raises
    ------
    InputError
        An unknown part, or a wrong color.
    """
    plot = resolve_group(analysis, part=part)
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        ax = look.ax
        style.log_axis(ax, "x", (plot.sizes[0] / 1.1, plot.sizes[-1] * 1.1), base=2)
        ax.set_ylim(*plot.limits)
        for index, drawn in enumerate(plot.parts):
            shade = look.color(index)
            ax.fill_between(plot.sizes, *drawn.random, color=look.faint, linewidth=0, zorder=0)
            ax.fill_between(plot.sizes, *drawn.others, color=shade, alpha=0.2, linewidth=0)
            defaults = {"color": shade, "marker": "o", "label": drawn.label}
            ax.plot(plot.sizes, drawn.shares, **style.merged(Line2D, defaults, kwargs))
        ax.plot(
            plot.sizes, plot.expected_mean, color=look.color(0), linestyle=":",
            linewidth=0.9 * look.scale, label="mean, from ρ",
        )  # fmt: skip
        # The largest size is no power of two: it has a tick, its close neighbor has none.
        *powers, largest = plot.sizes
        ax.xaxis.set_major_locator(
            FixedLocator([*(n for n in powers if 1.5 * n < largest), largest])
        )
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("adapters in the basis")
        ax.set_ylabel("share of ‖ΔW‖²")
        ends = [part for part in plot.parts if np.isfinite(part.shares[-1])]
        look.name_ends(
            [(plot.sizes[-1], part.shares[-1]) for part in ends],
            [part.label for part in ends],
            [look.color(plot.parts.index(part)) for part in ends],
        )
    return ax
