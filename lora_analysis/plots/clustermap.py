"""The similarity matrix of many adapters: similarities in the order of a tree, the tree above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.patches import Patch

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.heatmap import EXCESS_SCALE, ColorOptions, ColorScale
from lora_analysis.plots.labels import HoverCells, name_ticks, set_hover

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lora_analysis.studies import SimilarityMatrix

# More names than this cannot be read along one column's width.
_NAMED = 60
# Hover text of more adapters takes megabytes.
_HOVERED = 40
_LABELS = {
    "cosine": "signed cosine",
    "input": "input ω, excess over random",
    "output": "output ω, excess over random",
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
        label if index < len(placed) else f"{style.plain(label, 12)} (untrained)"
        for index, label in enumerate(labels)
    ]
    leaves = np.searchsorted(placed, order[: len(placed)])
    return ClustermapPlot(
        data=data,
        labels=tuple(style.plain(label, 24) for label in labels) if count <= _NAMED else (),
        branches=_branches(similarity_matrix.linkage("output", kind), leaves),
        limits=(-1.0, 1.0) if what == "cosine" else (-0.5, 1.0),
        color_label=_LABELS[what],
        title="" if kind == "all" else kind,
        names=tuple(similarity_matrix.labels[index] for index in order),
        marks=tuple((groups or {}).get(similarity_matrix.labels[index], "") for index in order)
        if groups
        else (),
    )


def _branches(tree: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the corners of every join of a linkage, leaves at 0, 1, 2, … in the order given."""
    count = len(order)
    x = np.empty(count + len(tree))
    height = np.zeros(count + len(tree))
    x[order] = np.arange(count)
    corners = np.empty((len(tree), 4, 2))
    for index, (left, right, joined, _) in enumerate(tree):
        a, b, node = int(left), int(right), count + index
        x[node], height[node] = (x[a] + x[b]) / 2, joined
        corners[index] = [(x[a], height[a]), (x[a], joined), (x[b], joined), (x[b], height[b])]
    return corners


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
        ``"output"`` or ``"input"`` (excess of ω; inputs with a shared start left out), or
        ``"cosine"``.
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
                    lambda top, _bottom, left, _right: (
                        f"{style.plain(plot.names[top])} and {style.plain(plot.names[left])}"
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
        beside = ax.inset_axes((1.02, 0, 0.035, 1))
        bar = ax.figure.colorbar(image, cax=beside, extend=scale.extend)
        bar.outline.set_visible(False)
        bar.set_label(scale.label)
        if plot.title:
            above.set_title(plot.title, parse_math=False)
    return ax


# Height of the strip of groups, in units of the matrix.
_STRIP = 0.03


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
        Patch(facecolor=color, label=style.legend_label(style.plain(name, 20)))
        for name, color in zip(names, look.palette, strict=False)
    ]
    look.ax.figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(names), 4), handlelength=1.0,
        columnspacing=1.2,
    )  # fmt: skip
    return _STRIP + 0.01
