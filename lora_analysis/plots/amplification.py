"""ΔW against W: amplification and enrichment, by rank over modules or by k for one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.lines import Line2D

from lora_analysis.amplify import Amplification
from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.module_values import ValueGroup, dropped_note, group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

Value = Literal["amplification_factor", "enrichment"]

_YLABEL = {
    "amplification_factor": "amplification ‖ΔW‖ / ‖UᵀWV‖",
    "enrichment": "enrichment ‖UᵀWV‖ / random",
}


@dataclass(frozen=True, slots=True, eq=False)
class RanksPlot:
    """Data of the plot by rank: per rank, one value per module and the random baseline.

    Attributes
    ----------
    ranks
        Distinct ranks, ascending; they stand at x = 0, 1, 2, ….
    measured, chance
        One group per rank. For enrichment chance is 1 for every module.
    band
        Per rank (low, high): the median over modules of mean ± one spread of random directions
        in the units of the value; NaN without draws.
    """

    ranks: tuple[int, ...]
    measured: tuple[ValueGroup, ...]
    chance: tuple[ValueGroup, ...]
    band: NDArray[np.float64]
    limits: tuple[float, float]
    ylabel: str
    note: str


@dataclass(frozen=True, slots=True, eq=False)
class DirectionsPlot:
    """Data of the plot of one module: the value over k = 1…n, the baseline, its band (n, 2)."""

    k: NDArray[np.intp]
    measured: NDArray[np.float64]
    chance: NDArray[np.float64]
    band: NDArray[np.float64]
    limits: tuple[float, float]
    ylabel: str
    title: str


def _check(value: str) -> None:
    if value not in _YLABEL:
        message = f"value must be one of {', '.join(map(repr, _YLABEL))}, got {value!r}."
        raise InputError(message)


def _series(
    item: Amplification, value: Value
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return over k the value, what random directions give, and their band ``(n, 2)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.stack(
            [item.random.mean - item.random.spread, item.random.mean + item.random.spread], axis=1
        )
        # (n, 2), near 1; a spread as large as the mean must not reach zero on a log axis.
        relative = np.maximum(spread / item.random.rms[:, None], 0.05)
        if value == "enrichment":
            return item.enrichment, np.ones(len(item.S)), relative
        return item.amplification_factor, item.chance_factor, item.chance_factor[:, None] / relative


def _limits(*arrays: NDArray[np.float64]) -> tuple[float, float]:
    """Return limits of a log axis around every positive finite value."""
    values = np.concatenate([np.ravel(a) for a in arrays])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 10.0
    low, high = float(values.min()), float(values.max())
    room = max((high / low) ** 0.08, 1.15)
    return low / room, high * room**2  # room above for the written medians


def resolve_directions(
    item: Amplification, *, value: Value = "amplification_factor"
) -> DirectionsPlot:
    """Resolve the data that `plot_amplification` draws for one module."""
    _check(value)
    measured, chance, band = _series(item, value)
    return DirectionsPlot(
        k=item.k,
        measured=measured,
        chance=chance,
        band=np.sort(band, axis=1),
        limits=_limits(measured, chance, band),
        ylabel=_YLABEL[value],
        title=style.drawable_text(" · ".join(filter(None, (item.module, item.label)))),
    )


def resolve_ranks(
    items: Sequence[Amplification],
    *,
    value: Value = "amplification_factor",
    ranks: Sequence[int] | None = None,
) -> RanksPlot:
    """Resolve the data that `plot_amplification` draws for several modules."""
    _check(value)
    if not items:
        message = "plot_amplification was given no amplification."
        raise InputError(message)
    of_item = [len(item.S) for item in items] if ranks is None else list(ranks)
    if len(of_item) != len(items):
        message = f"Got {len(of_item)} ranks for {len(items)} amplifications; one each is needed."
        raise InputError(message)
    distinct = tuple(sorted(set(of_item)))
    ends = [tuple(series[-1] for series in _series(item, value)) for item in items]
    measured, chance, band = [], [], []
    for rank in distinct:
        mine = [end for end, r in zip(ends, of_item, strict=True) if r == rank]
        measured.append(group(f"r = {rank}", [end[0] for end in mine]))
        chance.append(group("random directions", [end[1] for end in mine]))
        band.append(np.sort(np.median([end[2] for end in mine], axis=0)))
    return RanksPlot(
        ranks=distinct,
        measured=tuple(measured),
        chance=tuple(chance),
        band=np.array(band),
        limits=_limits(*(g.values for g in (*measured, *chance)), np.array(band)),
        ylabel=_YLABEL[value],
        note=dropped_note(tuple(measured)),
    )


def plot_amplification(
    items: Amplification | Sequence[Amplification],
    ax: Axes | None = None,
    *,
    value: Value = "amplification_factor",
    ranks: Sequence[int] | None = None,
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw how ΔW amplifies W, next to what random directions of the same size would score.

    Several items: one point per module at its adapter's rank, at k = numerical rank (the paper's
    number), with the median marked and written. One item: the value over k.

    The amplification factor alone proves nothing, it is large wherever ΔW is: gray is the factor
    of random directions. Enrichment is the ratio of the two, 1 (the line) for random directions,
    with one standard deviation of them shaded.

    Parameters
    ----------
    items
        From `amplification`, one per module and adapter.
    ax
        Axes to draw on; None makes a figure of one column's width.
    value
        ``"amplification_factor"`` or ``"enrichment"``; logarithmic axis.
    ranks
        The rank of each item's adapter; by default its numerical rank.
    color
        Color of ΔW's directions; by default the first of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``plot`` (one item) or ``scatter`` (several).

    Raises
    ------
    InputError
        No item, an unknown value, not one rank per item, or a wrong color.
    """
    plot = (
        resolve_directions(items, value=value)
        if isinstance(items, Amplification)
        else resolve_ranks(items, value=value, ranks=ranks)
    )
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        if isinstance(plot, DirectionsPlot):
            _paint_directions(look, plot, kwargs)
        else:
            _paint_ranks(look, plot, kwargs, at_one=value == "enrichment")
    return look.ax


def _paint_directions(look: style.Look, plot: DirectionsPlot, kwargs: dict[str, Any]) -> None:
    ax, n = look.ax, len(plot.k)
    _shade(look, plot.k, plot.band[:, 0], plot.band[:, 1])
    ax.plot(plot.k, plot.chance, color=look.muted, linestyle=(0, (4, 2)), label="random directions")
    defaults = {"color": look.color(0), "marker": "o" if n <= 16 else "", "label": "ΔW"}
    ax.plot(plot.k, plot.measured, **style.merge_kwargs(Line2D, defaults, kwargs))
    style.log_axis(ax, "y", plot.limits)
    ax.set_xlim(0.8 - 0.02 * n, n * 1.02 + 0.2)
    ax.set_xticks(style.count_ticks(n))
    ax.set_xlabel("k, directions of ΔW")
    ax.set_ylabel(plot.ylabel)
    ax.set_title(plot.title, parse_math=False)
    ends = np.log([plot.measured[-1], plot.chance[-1]])
    low, high = np.log(plot.limits)
    heights = (np.nan_to_num(ends, posinf=high, neginf=low) - low) / (high - low)
    for y, text, color in zip(
        style.spread_apart(heights, 0.08, (0, 1)), ("ΔW", "random"), (look.color(0), look.muted),
        strict=True,
    ):  # fmt: skip
        ax.text(
            1.02, y, text, transform=ax.transAxes, color=color, va="center", fontsize=look.small
        )


def _shade(look: style.Look, x: ArrayLike, low: ArrayLike, high: ArrayLike) -> None:
    """Shade one standard deviation of random directions."""
    look.ax.fill_between(
        x, low, high, color=look.muted, alpha=0.2, linewidth=0,
        label="random directions, one spread",
    )  # fmt: skip


def _paint_ranks(
    look: style.Look, plot: RanksPlot, kwargs: dict[str, Any], *, at_one: bool
) -> None:
    ax, color = look.ax, look.color(0)
    style.log_axis(ax, "y", plot.limits)
    for x, (low, high) in enumerate(plot.band):
        _shade(look, [x - 0.4 if at_one else x, x + 0.4], low, high)
    if at_one:
        look.draw_baseline("y", 1)
    for x, (measured, chance) in enumerate(zip(plot.measured, plot.chance, strict=True)):
        if at_one:
            _paint_column(look, measured, x, plot, color=color, width=0.25, kwargs=kwargs)
        else:
            _paint_column(look, measured, x - 0.2, plot, color=color, width=0.12, kwargs=kwargs)
            _paint_column(look, chance, x + 0.2, plot, color=look.muted, width=0.12, kwargs={})
    ax.set_xlim(-0.55, len(plot.ranks) - 0.35)
    ax.set_xticks(range(len(plot.ranks)), [str(rank) for rank in plot.ranks])
    ax.set_xlabel("rank of the adapter" + (f"\n{plot.note}" if plot.note else ""))
    ax.set_ylabel(plot.ylabel)
    # Only the factor depends on the size of ΔW.
    random = "random directions" if at_one else "random directions, same ‖ΔW‖"
    for x, text, ink, align in ((0, "ΔW’s directions", color, "left"),
                                (1, random, look.muted, "right")):  # fmt: skip
        ax.text(x, 1.02, text, transform=ax.transAxes, color=ink, fontsize=look.small, ha=align)


def _paint_column(
    look: style.Look,
    points: ValueGroup,
    x: float,
    plot: RanksPlot,
    *,
    color: str,
    width: float,
    kwargs: dict[str, Any],
) -> None:
    """Draw one group as a vertical strip with its median marked and written."""
    ax, values = look.ax, points.values[points.values > 0]
    if not values.size:
        return
    span = (float(np.log(plot.limits[0])), float(np.log(plot.limits[1])))
    defaults = {
        "s": 9 * look.scale**2,
        "color": color,
        "alpha": 0.55,
        "linewidth": 0,
        "rasterized": len(values) > style.MANY_POINTS,
        "label": style.legend_label(points.label),
    }
    offsets = style.swarm(np.log(values), span, width=width)
    ax.scatter(x + offsets, values, **style.merge_kwargs(PathCollection, defaults, kwargs))
    ax.plot([x - 0.17, x + 0.17], [points.median] * 2, color=color, linewidth=2 * look.scale)
    written = f"{points.median:.2f}" if points.median < 10 else f"{points.median:.3g}"
    ax.annotate(
        written,
        (x, values.max()),
        xytext=(0, 4 * look.scale),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=look.small,
        color=color,
        fontweight="bold",
        annotation_clip=False,
    )
