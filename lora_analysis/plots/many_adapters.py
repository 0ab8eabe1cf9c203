"""Many adapters in one picture: their similarity matrix with its tree, and the group analysis.

The matrix has alike adapters side by side. The group analysis shows the energy that common parts
hold, over the number of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.heatmap import EXCESS_SCALE, ColorOptions, ColorScale
from lora_analysis.plots.labels import HoverCells, name_ticks, set_hover
from lora_analysis.studies.group_shares import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lora_analysis.studies import GroupAnalysis, SimilarityMatrix

# More names than this cannot be read along one column's width.
_NAMED = 60
# Hover text of more adapters takes megabytes.
_HOVERED = 40
_LABELS = {
    "cosine": "signed cosine",
    "input": "input ω, excess over random",
    "output": "output ω, excess over random",
}
# Height of the strip of groups, in units of the matrix.
_STRIP = 0.03
# Common parts of a group.
_PART_LABELS = {
    "mean": "mean",
    "matrices": "{k} matrices",
    "matrices_beyond_mean": "{k} matrices\nbeyond the mean",
    "directions": "{k} directions,\nboth sides",
    "input": "{k} directions,\ninput side",
    "output": "{k} directions,\noutput side",
}


@dataclass(frozen=True, slots=True, eq=False)
class ClustermapPlot:
    """Data drawn by `plot_clustermap`.

    Attributes
    ----------
    data
        ``(N, N)`` in the order of the tree, NaN if there is no number.
    labels
        In that order; empty if there is no room for them.
    branches
        ``(P − 1, 4, 2)``: the corners (x, height) of each join, x in the order of the tree.
        P adapters are trained; the others stand last, outside the tree, and are named so.
    names
        Labels of all adapters in that order, for hover text.
    marks
        Group of each adapter in that order, "" for none; empty without groups.
    """

    data: NDArray[np.float64]
    labels: tuple[str, ...]
    branches: NDArray[np.float64]
    limits: tuple[float, float]
    color_label: str
    title: str
    names: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


def resolve_clustermap(
    similarity_matrix: SimilarityMatrix,
    *,
    what: str = "output",
    kind: str = "all",
    groups: Mapping[str, str] | None = None,
) -> ClustermapPlot:
    """Resolve the data that `plot_clustermap` draws."""
    count = len(similarity_matrix.labels)
    if count < 2:
        message = f"A similarity matrix needs at least two adapters, it has {count}."
        raise InputError(message)
    order = similarity_matrix.order("output", kind)
    data = similarity_matrix.matrix(what, kind)[np.ix_(order, order)]
    placed = similarity_matrix.placed("output", kind)
    labels = style.without_common_start([similarity_matrix.labels[index] for index in order])
    labels = [
        label if index < len(placed) else f"{style.drawable_text(label, 12)} (untrained)"
        for index, label in enumerate(labels)
    ]
    # The corners of every join, with the leaves at 0, 1, 2, … in the order of the matrix.
    tree = similarity_matrix.linkage("output", kind)
    x, height = np.zeros((2, len(placed) + len(tree)))
    x[np.searchsorted(placed, order[: len(placed)])] = np.arange(len(placed))
    branches = np.empty((len(tree), 4, 2))
    for node, (left, right, joined, _) in enumerate(tree, start=len(placed)):
        a, b = int(left), int(right)
        x[node], height[node] = (x[a] + x[b]) / 2, joined
        branches[node - len(placed)] = [
            (x[a], height[a]), (x[a], joined), (x[b], joined), (x[b], height[b]),
        ]  # fmt: skip
    return ClustermapPlot(
        data=data,
        labels=tuple(style.drawable_text(label, 24) for label in labels) if count <= _NAMED else (),
        branches=branches,
        limits=(-1.0, 1.0) if what == "cosine" else (-0.5, 1.0),
        color_label=_LABELS[what],
        title="" if kind == "all" else kind,
        names=tuple(similarity_matrix.labels[index] for index in order),
        marks=tuple((groups or {}).get(similarity_matrix.labels[index], "") for index in order)
        if groups
        else (),
    )


def plot_clustermap(
    similarity_matrix: SimilarityMatrix,
    ax: Axes | None = None,
    *,
    what: str = "output",
    kind: str = "all",
    groups: Mapping[str, str] | None = None,
    cmap: str | Colormap | None = None,
    vmin: float | None = None,
    vmax: float | Literal["auto"] | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw every adapter against every other, alike ones side by side, and the tree above.

    The tree is that of average linkage on 1 − (output excess of ω), in every panel, so that
    panels of several quantities can be compared place by place. Untrained adapters have no number
    and stand last, gray, outside the tree.

    Parameters
    ----------
    similarity_matrix
        ``Study.similarity_matrix``.
    ax
        Axes to draw on; None makes a figure of one column's width.
    what
        ``"output"`` or ``"input"`` (excess of ω, without the input side of shared initializations),
        or ``"cosine"``.
    kind
        One type of module, or ``"all"``.
    groups
        Group of adapters by label, for example their tasks: a colored strip with a legend.
    cmap, vmin, vmax
        Colormap, and values of its first and last color; ``vmax="auto"`` is the largest value.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``imshow``.

    Raises
    ------
    InputError
        Fewer than two adapters, an unknown quantity or kind, or wrong colors.
    """
    plot = resolve_clustermap(similarity_matrix, what=what, kind=kind, groups=groups)
    count = len(plot.data)
    scale = (
        ColorScale(mpl.colormaps["RdBu"], plot.limits, plot.color_label)
        if what == "cosine"
        else replace(EXCESS_SCALE, label=plot.color_label, ticks=())
    ).with_range(plot.data, ColorOptions(cmap=cmap, vmin=vmin, vmax=vmax))
    size = (style.ONE_COLUMN, style.ONE_COLUMN + 0.5)
    with style.drawing(ax, size, figsize=figsize) as look:
        ax = look.ax
        # Of many, colors are chosen for the pixels that are drawn and not for every pair.
        data = plot.data if count <= _NAMED else plot.data.astype(np.float32)
        defaults = {"interpolation_stage": "data"}
        image = ax.imshow(
            np.ma.masked_invalid(data, copy=False),
            **scale.image_options(look.blank, defaults | kwargs),
        )
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        if plot.labels:
            size_of_names = look.small if count <= 24 else look.small * 5 / 7
            name_ticks(ax, "x", range(count), plot.labels, fontsize=size_of_names, vertical=True)
            name_ticks(ax, "y", range(count), plot.labels, fontsize=size_of_names)
        else:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_xlabel(f"{count} adapters")
        if count <= _HOVERED:  # the cells would be held for as long as the figure
            set_hover(
                ax,
                HoverCells(
                    plot.data,
                    (-0.5, -0.5),
                    lambda top, _bottom, left, _right: " and ".join(
                        style.drawable_text(plot.names[index]) for index in (top, left)
                    ),
                    most=_HOVERED**2,
                ),
            )
        marks = _paint_marks(look, plot)
        above = ax.inset_axes((0, 1.01 + marks, 1, 0.16))
        above.add_collection(
            LineCollection(list(plot.branches), colors=look.muted, linewidths=0.6 * look.scale)
        )
        above.set_xlim(-0.5, count - 0.5)
        above.set_ylim(0, max(float(plot.branches[..., 1].max(initial=0.0)), 1e-9) * 1.05)
        above.set_axis_off()
        bar_axes = ax.inset_axes((1.02, 0, 0.035, 1))
        bar = ax.figure.colorbar(image, cax=bar_axes, extend=scale.extend)
        bar.outline.set_visible(False)
        bar.set_label(scale.label)
        if plot.title:
            above.set_title(plot.title, parse_math=False)
    return ax


def _paint_marks(look: style.Look, plot: ClustermapPlot) -> float:
    """Draw the groups as a strip above the matrix, with a legend; return the room it takes."""
    names = [name for name in dict.fromkeys(plot.marks) if name]
    if not names or len(names) > len(look.palette):
        return 0.0
    codes = [names.index(mark) + 1 if mark else 0 for mark in plot.marks]
    colors = ListedColormap([look.blank, *look.palette[: len(names)]])
    strip = look.ax.inset_axes((0, 1.01, 1, _STRIP))
    strip.imshow([codes], aspect="auto", cmap=colors, norm=Normalize(0, len(names)))
    strip.set_axis_off()
    handles = [
        Patch(facecolor=color, label=style.legend_label(style.drawable_text(name, 20)))
        for name, color in zip(names, look.palette, strict=False)
    ]
    look.ax.figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(names), 4), handlelength=1.0,
        columnspacing=1.2,
    )  # fmt: skip
    return _STRIP + 0.01


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
                _PART_LABELS[name].format(k=analysis.k),
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
            ax.plot(plot.sizes, drawn.shares, **style.merge_kwargs(Line2D, defaults, kwargs))
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
