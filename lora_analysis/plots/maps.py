"""A whole model in one picture: one number per module, blocks or layers across, parts down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap

from lora_analysis.blocks import is_image, locate_module, short_names
from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.heatmap import EXCESS_SCALE, ColorOptions, ColorScale, phi_scale
from lora_analysis.plots.labels import (
    HoverCells,
    column_order,
    module_columns,
    name_ticks,
    set_hover,
    set_title,
    text_width,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

    from lora_analysis.intruders import IntruderReport
    from lora_analysis.spectra import Side


@dataclass(frozen=True, slots=True, eq=False)
class ModuleMap:
    """Data drawn by `plot_module_map`: ``data[t, l]`` belongs to type t in layer l, NaN is blank.

    ``layers`` are the numbers of layers or, of an image model, the names of blocks. If a type has
    several modules in a layer (experts, transformer layers of a U-Net's block) their median stands
    there.
    """

    data: NDArray[np.float64]
    kinds: tuple[str, ...]
    layers: tuple[int | str, ...]
    limits: tuple[float, float]
    label: str
    title: str

    def cell_name(self, row: int, column: int) -> str:
        """Return ``"q_proj, layer 2"`` or, of an image model, ``"IN04 attn1.to_q"``."""
        kind, layer = self.kinds[row], self.layers[column]
        return f"{layer} {kind}" if isinstance(layer, str) else f"{kind}, layer {layer}"


# Cells with hover text, each of 150 bytes in an SVG; those of a larger map are merged.
_MOST_CELLS = 1200
# Inches next to a row of maps for the bar of colors with its label.
_COLORBAR_WIDTH = 0.9
# Rows that a map's height grows with.
_MOST_ROWS = 48


def resolve_module_map(
    values: Mapping[str, float],
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    label: str = "φ",
    title: str = "",
) -> ModuleMap:
    """Resolve the data that `plot_module_map` draws."""
    if not values:
        message = "plot_module_map was given no module."
        raise InputError(message)
    columns = module_columns(values.keys())
    cells: dict[tuple[str, int | str], list[float]] = {}
    for name in columns:
        cells.setdefault((locate_module(name).name, columns[name]), []).append(float(values[name]))
    kinds = tuple(dict.fromkeys(kind for kind, _ in cells))
    layers = column_order(columns)
    data = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), cell_values in cells.items():
        finite = [value for value in cell_values if np.isfinite(value)]
        if finite:
            data[kinds.index(kind), layers.index(layer)] = np.median(finite)
    return ModuleMap(data, tuple(map(style.drawable_text, kinds)), layers, limits, label, title)


def _scale(plots: Sequence[ModuleMap], options: ColorOptions) -> ColorScale:
    """Return the colors that maps of one quantity share."""
    first = plots[0]
    colors = EXCESS_SCALE.colors if first.limits[0] < 0 else phi_scale().colors
    values = np.concatenate([plot.data.ravel() for plot in plots])
    return ColorScale(colors, first.limits, first.label).with_range(values, options)


def paint_module_map(
    ax: Axes,
    plot: ModuleMap,
    scale: ColorScale,
    kwargs: dict[str, Any],
    *,
    title_width: float | None = None,
) -> AxesImage:
    """Draw a resolved map; return its image, to which a color bar can belong.

    The title takes at most ``title_width`` points, by default the width of the axes.
    """
    rows, columns = plot.data.shape
    blank = style.look(ax).blank
    image = ax.imshow(
        np.ma.masked_invalid(plot.data),
        **scale.image_options(blank, {"aspect": "auto"} | kwargs),
    )
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    name_ticks(ax, "y", range(rows), plot.kinds)
    of_blocks = any(isinstance(layer, str) for layer in plot.layers)
    step = 1 if of_blocks else max(1, -(-columns // 8))
    names = [str(layer) for layer in plot.layers[::step]]
    name_ticks(ax, "x", range(0, columns, step), names, vertical=None)
    ax.set_xlabel("block" if of_blocks else "layer")
    set_title(ax, plot.title, title_width)
    set_hover(
        ax,
        HoverCells(
            plot.data,
            (-0.5, -0.5),
            lambda top, _bottom, left, _right: plot.cell_name(top, left),
            most=min(plot.data.size, _MOST_CELLS),
        ),
    )
    return image


def plot_module_map(
    values: Mapping[str, float],
    ax: Axes | None = None,
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    label: str = "φ",
    title: str = "",
    cmap: str | Colormap | None = None,
    vmin: float | None = None,
    vmax: float | Literal["auto"] | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw one number per module as a map: layers across, types of module down.

    Parameters
    ----------
    values
        Module name to its number; gray where it is not finite, or there is no such module.
    ax
        Axes to draw on; None makes a figure of one column's width.
    limits
        Limits of the colors. With a lower limit below 0 the scale shows the excess over random:
        white at 0.
    label
        What the number is, for the color bar.
    title
        Title of the map.
    cmap, vmin, vmax
        Colormap, and values of its first and last color if they differ from ``limits``;
        ``vmax="auto"`` is the largest value, and the color bar says so.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``imshow``.

    Raises
    ------
    InputError
        No module, or wrong colors.
    """
    plot = resolve_module_map(values, limits=limits, label=label, title=title)
    scale = _scale([plot], ColorOptions(cmap=cmap, vmin=vmin, vmax=vmax))
    size = (style.ONE_COLUMN, 0.9 + 0.2 * min(max(len(plot.kinds), 3), _MOST_ROWS))
    with style.drawing(ax, size, figsize=figsize) as look:
        image = paint_module_map(look.ax, plot, scale, kwargs)
        _paint_colorbar(look.ax, image, scale)
    return look.ax


def _paint_colorbar(ax: Axes, image: AxesImage, scale: ColorScale) -> None:
    ax.figure.colorbar(
        image, ax=ax, label=scale.label, extend=scale.extend, fraction=0.08, pad=0.03
    )


def figure_module_maps(
    maps: Sequence[Sequence[ModuleMap]], *, width: float = style.TWO_COLUMNS
) -> Figure:
    """Draw rows of maps of one set of modules; one color bar next to each row.

    Raises
    ------
    InputError
        ``maps`` or one of its rows is empty.
    """
    if not maps or not all(maps):
        message = "A figure of maps needs at least one map in every row."
        raise InputError(message)
    columns = max(map(len, maps))
    # The label next to the bar of colors needs the height of four rows.
    heights = [
        0.75 + 0.17 * min(max(4, *(len(module_map.kinds) for module_map in row)), _MOST_ROWS)
        for row in maps
    ]
    with style.house_style(width):
        grown = style.font_scale() * sum(heights)
        figure = style.PanelFigure(figsize=(width, grown), layout="constrained")
        axes = figure.subplots(len(maps), columns, squeeze=False, height_ratios=heights)
        for row, places in zip(maps, axes, strict=True):
            font = places[0].yaxis.get_major_ticks()[0].label1.get_fontproperties()
            names = max(text_width(kind, font) for kind in row[0].kinds)
            room = (72 * (width - _COLORBAR_WIDTH) - names) / columns
            scale = _scale(row, {})
            images = [
                paint_module_map(ax, module_map, scale, {}, title_width=room)
                for ax, module_map in zip(places, row, strict=False)
            ]
            for ax in places[len(row) :]:
                ax.set_axis_off()
            for ax in places[1:]:
                ax.set_yticklabels([])
            figure.colorbar(
                images[-1], ax=list(places), label=scale.label, extend=scale.extend, pad=0.01
            )
    return figure


@dataclass(frozen=True, slots=True, eq=False)
class IntruderStrip:
    """Data drawn by `plot_intruders`: one row per report, one column per direction of W + ΔW.

    ``cosine`` is the largest with any of W's directions, ``intruder`` where that is below ε;
    ``novelty`` the share outside W's leading directions.
    """

    cosine: NDArray[np.float64]
    intruder: NDArray[np.bool_]
    novelty: NDArray[np.float64]
    labels: tuple[str, ...]
    epsilon: float
    side: Side


def resolve_intruders(reports: Sequence[IntruderReport], *, side: Side = "output") -> IntruderStrip:
    """Resolve the data that `plot_intruders` draws."""
    if not reports:
        message = "plot_intruders was given no report."
        raise InputError(message)
    k = max(len(report.S) for report in reports)
    cosine, novelty = np.full((2, len(reports), k), np.nan)
    for row, report in enumerate(reports):
        cosine[row, : len(report.S)] = report.sides[side].max_cosine
        novelty[row, : len(report.S)] = report.sides[side].novelty
    modules = [report.module for report in reports]
    short = style.without_common_start(modules)
    titles = short_names(modules) if is_image(modules) else dict(zip(modules, short, strict=True))
    several = len({report.label for report in reports}) > 1
    labels = [
        f"{report.label} {titles[report.module]}" if several else titles[report.module]
        for report in reports
    ]
    return IntruderStrip(
        cosine=cosine,
        intruder=cosine < reports[0].epsilon,
        novelty=novelty,
        labels=tuple(style.drawable_text(label, 32) for label in labels),
        epsilon=reports[0].epsilon,
        side=side,
    )


def plot_intruders(
    reports: Sequence[IntruderReport],
    ax: Axes | None = None,
    *,
    side: Side = "output",
    cmap: str | Colormap | None = None,
    vmin: float | None = None,
    vmax: float | Literal["auto"] | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the leading directions of W + ΔW by how like W's they are; intruders carry a dot.

    One row per report. A dot's size is its novelty: a small one only mixes directions that W has.

    Parameters
    ----------
    reports
        From `intruder_dimensions`, one per module or adapter.
    ax
        Axes to draw on; None makes a figure of one column's width.
    side
        ``"input"`` or ``"output"``.
    cmap, vmin, vmax
        Colormap, and cosines of its first and last color, by default 0 and 1.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``imshow``.

    Raises
    ------
    InputError
        No report, or wrong colors.
    """
    plot = resolve_intruders(reports, side=side)
    rows, columns = plot.cosine.shape
    cosines = np.ma.masked_invalid(plot.cosine)
    scale = ColorScale(mpl.colormaps["cividis"], (0.0, 1.0), "largest cosine with W's").with_range(
        cosines, ColorOptions(cmap=cmap, vmin=vmin, vmax=vmax)
    )
    with style.drawing(ax, (style.ONE_COLUMN, 0.7 + 0.16 * rows), figsize=figsize) as look:
        ax = look.ax
        defaults = {"aspect": "auto", "extent": (0.5, columns + 0.5, rows - 0.5, -0.5)}
        image = ax.imshow(cosines, **scale.image_options(look.blank, defaults | kwargs))
        ax.grid(visible=False)
        if plot.intruder.any():
            where = np.argwhere(plot.intruder)
            size = (2 + 22 * np.nan_to_num(plot.novelty[plot.intruder])) * look.scale**2
            color = look.visible_on(image.to_rgba(cosines)[plot.intruder])
            ax.scatter(
                where[:, 1] + 1, where[:, 0], s=size, color=color, linewidth=0, label="intruder"
            )
        ax.spines[:].set_visible(False)
        name_ticks(ax, "y", range(rows), plot.labels)
        ax.set_xticks(style.count_ticks(columns))
        ax.set_xlabel(
            f"direction of W + ΔW, {side} side\ndot: cosine below {plot.epsilon:g}, by novelty"
        )
        _paint_colorbar(ax, image, scale)
    return ax
