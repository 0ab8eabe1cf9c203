"""Heat-maps of φ(i, j), the picture of section 7.2 of the LoRA paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.transforms import ScaledTranslation

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.hatching import hatch_cells
from lora_analysis.plots.hover import HoverCells, set_hover, span
from lora_analysis.plots.labels import set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

    from lora_analysis.similarity import SimilarityGrid

PHI = "φ(i, j)"
EXCESS = "excess φ over random\n(φ − c)/(1 − c)"
# Chance of a third puts orthogonal subspaces at −0.5; below that the color bar gets an arrow.
EXCESS_LIMITS = (-0.5, 1.0)


def excess_colors() -> Colormap:
    """Return the colors of excess φ: white at 0, purple above, orange below.

    Cut out of a symmetric color-blind-safe map, so that equal distances from 0 look alike.
    """
    low, high = EXCESS_LIMITS
    where = np.linspace(0.5 + low / 2, 0.5 + high / 2, 384)
    return ListedColormap(mpl.colormaps["PuOr"](where), name="excess")


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """Everything a heat-map shows, worked out before anything is drawn.

    Attributes
    ----------
    data
        ``(rows, columns)``, masked where a cell is not shown; ``data[i-1, j-1]`` belongs to (i, j).
    degenerate, nearly_degenerate
        ``(rows, columns)``: shown cells whose subspaces are not, or not well, defined.
    chance
        Least and largest the random baseline over the shown cells; None if chance is the zero.
    note
        Text shown instead of a picture; empty if there is one.
    """

    data: np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]]
    degenerate: NDArray[np.bool_]
    nearly_degenerate: NDArray[np.bool_]
    limits: tuple[float, float]
    colors: Colormap
    color_label: str
    chance: tuple[float, float] | None
    below: bool
    xlabel: str
    ylabel: str
    title: str
    note: str = ""
    quantity: str = "φ"

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top: cell (i, j) is centered on (j, i), and i grows downward."""
        rows, columns = self.data.shape
        return 0.5, columns + 0.5, rows + 0.5, 0.5


def _cell_flags(grid: SimilarityGrid) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return masks ``(k1, k2)`` of degenerate cells and of nearly degenerate ones."""
    rows, columns = grid.rows_degeneracy, grid.columns_degeneracy
    degenerate = rows.degenerate[:, None] | columns.degenerate[None, :]  # (k1, k2)
    nearly_degenerate = rows.nearly_degenerate[:, None] | columns.nearly_degenerate[None, :]
    return degenerate, nearly_degenerate & ~degenerate


def _window(grid: SimilarityGrid, zoom: int | None) -> tuple[int, int, NDArray[np.bool_]]:
    """Return rows and columns to draw, and which of those cells are left out."""
    rows, columns = grid.values.shape
    if zoom is None:
        return rows, columns, np.zeros((rows, columns), dtype=bool)
    if zoom < 1:
        message = f"zoom is a number of directions, at least 1, got {zoom}."
        raise InputError(message)
    n = min(zoom, rows, columns)
    return n, n, np.triu(np.ones((n, n), dtype=bool), k=1)


def _untrained_note(grid: SimilarityGrid) -> str:
    empty = [
        style.plain(label, 24)
        for label, size in zip(grid.labels, grid.values.shape, strict=True)
        if not size
    ]
    return f"{' and '.join(empty)}:\nuntrained, no directions" if empty else ""


def resolve_similarity(
    grid: SimilarityGrid,
    *,
    zoom: int | None = None,
    excess: bool = False,
    title: str | None = None,
) -> HeatMap:
    """Resolve the data that `plot_similarity` draws."""
    rows, columns, left_out = _window(grid, zoom)
    corner = (slice(rows), slice(columns))
    degenerate, nearly_degenerate = (flags[corner] & ~left_out for flags in _cell_flags(grid))
    values = (grid.excess if excess else grid.values)[corner]
    data = np.ma.masked_where(left_out | degenerate | ~np.isfinite(values), values)
    expected = grid.chance[corner][~left_out]
    has_band = not excess and expected.size > 0
    return HeatMap(
        data=data,
        degenerate=degenerate,
        nearly_degenerate=nearly_degenerate,
        limits=EXCESS_LIMITS if excess else (0.0, 1.0),
        colors=excess_colors() if excess else mpl.colormaps["viridis"],
        color_label=EXCESS if excess else PHI,
        chance=(float(expected.min()), float(expected.max())) if has_band else None,
        below=bool(excess and data.count() and data.min() < EXCESS_LIMITS[0]),
        xlabel=f"j  ({style.plain(grid.labels[1], 24)})",
        ylabel=f"i  ({style.plain(grid.labels[0], 24)})",
        title=style.plain(grid.module if title is None else title),
        note=_untrained_note(grid),
        quantity="excess φ" if excess else "φ",
    )


def paint_heatmap(ax: Axes, heatmap: HeatMap, *, side: float = 2.0) -> AxesImage:
    """Draw a resolved heat-map; return its image, to which a color bar can belong.

    ``side`` is the room along each axis in inches: it limits the number of tick labels.
    """
    image = ax.imshow(
        heatmap.data if heatmap.data.size else np.ma.array([[0.0]], mask=True),
        cmap=heatmap.colors.with_extremes(bad=style.BLANK),
        norm=Normalize(*heatmap.limits),
        extent=heatmap.extent if heatmap.data.size else (0, 1, 1, 0),
        aspect="auto",
        interpolation="nearest",
    )
    ax.spines[:].set_visible(False)
    style.set_label(ax, "x", heatmap.xlabel)
    style.set_label(ax, "y", heatmap.ylabel)
    set_title(ax, heatmap.title, 72 * side)
    if heatmap.data.size:
        _paint_marks(ax, heatmap, side)
        set_hover(
            ax,
            HoverCells(
                np.ma.filled(heatmap.data, np.nan),
                (0.5, 0.5),
                lambda top, bottom, left, right: (
                    f"{heatmap.quantity}({span(top, bottom)}, {span(left, right)})"
                ),
            ),
        )
    else:
        _paint_note(ax, heatmap.note)
    return image


def _paint_marks(ax: Axes, heatmap: HeatMap, side: float) -> None:
    """Draw ticks, as many as ``side`` inches have room for, and lines over doubtful cells."""
    gray, lines = "#9a9a9a", (1, 1, 1, 0.35) if heatmap.limits[0] == 0 else (0.3, 0.3, 0.3, 0.2)
    hatch_cells(
        ax, heatmap.degenerate, "degenerate", facecolor="none", edgecolor=gray, hatch="xxxx"
    )
    hatch_cells(
        ax,
        heatmap.nearly_degenerate,
        "nearly degenerate",
        facecolor="none",
        edgecolor=lines,
        hatch="////",
    )
    rows, columns = heatmap.data.shape
    label_width = 0.01 + 0.065 * len(str(columns))
    ax.set_xticks(style.count_ticks(columns, min(9, int(side / label_width))))
    ax.set_yticks(style.count_ticks(rows, min(9, int(side / 0.1))))


def _paint_note(ax: Axes, note: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    text = ax.text(0.5, 0.5, note, ha="center", va="center", color=style.QUIET, parse_math=False)
    text.set_transform(ax.transAxes)


def paint_colorbar(
    image: AxesImage, ax: Axes, heatmap: HeatMap, *, inside: bool = False
) -> Colorbar:
    """Draw a color bar as tall as ``ax`` with the random baseline marked next to it.

    It stands at the right of ``ax``, or ``inside`` at the left where ``ax`` is an empty place.
    """
    gap = ScaledTranslation(0.0 if inside else 0.2, 0, ax.figure.dpi_scale_trans)
    room = ax.inset_axes((0 if inside else 1, 0, 0.06, 1), transform=ax.transAxes + gap)
    bar = ax.figure.colorbar(image, cax=room, extend="min" if heatmap.below else "neither")
    bar.outline.set_visible(False)
    bar.set_label(heatmap.color_label)
    bar.set_ticks(np.linspace(*heatmap.limits, 6 if heatmap.limits[0] == 0 else 4).tolist())
    if heatmap.chance:
        _mark_chance(room, heatmap.chance)
    return bar


def _mark_chance(bar: Axes, chance: tuple[float, float]) -> None:
    """Draw the range of the random baseline as a line left of a color bar."""
    low, high = chance
    beside = bar.get_yaxis_transform() + ScaledTranslation(-0.04, 0, bar.figure.dpi_scale_trans)
    (line,) = bar.plot([0, 0], [low, max(high, low + 0.01)], transform=beside, label="random")
    line.set(color=style.INK, linewidth=1.6, solid_capstyle="butt", clip_on=False)
    bar.annotate(
        "random",
        (0, low),
        xycoords=beside,
        xytext=(-1.5, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=7,
        color=style.QUIET,
    )


def plot_similarity(
    grid: SimilarityGrid,
    ax: Axes | None = None,
    *,
    zoom: int | None = None,
    excess: bool = False,
    colorbar: bool = True,
    title: str | None = None,
) -> Axes:
    """Draw φ(i, j) as a heat-map, i down and j across, both from 1 (LoRA, Figures 3 and 4).

    0 (dark) is orthogonal, 1 (bright) means that the smaller subspace is contained in the larger.
    The bar next to the color scale spans the random baseline, max(i, j)/d, over the drawn cells.

    Cells whose subspace is undefined (coinciding singular values) are gray and cross-hatched;
    nearly degenerate ones (relative gap below 0.05) carry light lines: read
    nothing from a single one of them.

    Parameters
    ----------
    grid
        From `subspace_similarity`.
    ax
        If to draw; None makes a figure of one column's width.
    zoom
        Draw the corner i, j ≤ zoom only, and in it the triangle j ≤ i, as the third and fourth
        panel of the paper's Figure 3. φ is divided by min(i, j), so the two triangles answer
        different questions. If j ≥ i, which is nearly all of a wide grid: how much of the
        first's top i lies in the second's top j. If j ≤ i, a sliver of it: how much of the
        second's top j lies in the first's top i. The zoom shows the sliver alone.
    excess
        Draw ``(φ − c)/(1 − c)`` instead: 0 (white) is chance, 1 full agreement, orange less
        than chance. For dimensions so small that chance c is not.
    colorbar
        Whether to add a color bar.
    title
        The module's name by default.

    Returns
    -------
    Axes
        With the drawn values as its only image, φ fixed to the range 0 to 1.

    Raises
    ------
    InputError
        ``zoom`` is below 1.
    """
    heatmap = resolve_similarity(grid, zoom=zoom, excess=excess, title=title)
    with style.house_style():
        rows, columns = heatmap.data.shape
        shape = float(np.clip(rows / max(columns, 1), 0.6, 1.0)) if rows else 1.0
        owns_figure = ax is None
        ax = style.axes_or_new(ax, (style.ONE_COLUMN, 0.65 + 2.05 * shape))
        if owns_figure:
            ax.set_box_aspect(shape)
        image = paint_heatmap(ax, heatmap)
        if colorbar:
            paint_colorbar(image, ax, heatmap)
    return ax
