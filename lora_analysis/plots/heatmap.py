"""Heat-maps of φ(i, j), the picture of section 7.2 of the LoRA paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.image import AxesImage
from matplotlib.transforms import ScaledTranslation

from lora_analysis import linalg
from lora_analysis.errors import InputError
from lora_analysis.patterns import did_you_mean
from lora_analysis.plots import style
from lora_analysis.plots.hatching import hatch_cells
from lora_analysis.plots.labels import HoverCells, set_hover, set_title, span
from lora_analysis.similarity import Degeneracy, SimilarityGrid, subspace_similarity
from lora_analysis.spectra import default_side

if TYPE_CHECKING:
    from matplotlib.colorbar import Colorbar
    from numpy.typing import ArrayLike, NDArray

    from lora_analysis.spectra import Side, VectorsOf

PHI = "φ(i, j)"
EXCESS = "excess φ over random\n(φ − c)/(1 − c)"
# Chance of a third puts orthogonal subspaces at −0.5; below that the color bar gets an arrow.
EXCESS_LIMITS = (-0.5, 1.0)


class ColorOptions(TypedDict, total=False):
    """Colors of a heat-map: a colormap or its name, and the values of its first and last color."""

    cmap: str | Colormap | None
    vmin: float | None
    vmax: float | Literal["auto"] | None


@dataclass(frozen=True, slots=True, eq=False)
class ColorScale:
    """Colors of a heat-map and what its color bar says of them.

    Attributes
    ----------
    limits
        Values of the first and the last color.
    ticks
        Of the color bar; empty leaves them to matplotlib.
    below, above
        Whether values are outside the limits: an arrow at that end of the color bar.
    """

    colors: Colormap
    limits: tuple[float, float]
    label: str
    ticks: tuple[float, ...] = ()
    below: bool = False
    above: bool = False

    @property
    def extend(self) -> Literal["neither", "min", "max", "both"]:
        """Ends of the color bar with an arrow, in matplotlib's words."""
        if self.below:
            return "both" if self.above else "min"
        return "max" if self.above else "neither"

    def with_range(self, values: ArrayLike, options: ColorOptions) -> ColorScale:
        """Return these colors with the user's options, for a picture of ``values``.

        Raises
        ------
        InputError
            The name of the colormap is unknown, or the limits are not two ascending numbers.
        """
        array: Any = np.ma.masked_invalid(np.ma.asarray(values))
        cmap, vmin, vmax = (options.get(name) for name in ("cmap", "vmin", "vmax"))
        low, high = self.limits
        label = self.label
        try:
            low = low if vmin is None else float(vmin)  # type: ignore[arg-type]
            if vmax == "auto":
                high = float(array.max()) if array.count() and array.max() > low else high
                label += f"\nauto: {low:g} to {high:.2g}"
            elif vmax is not None:
                high = float(vmax)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            message = f"vmin and vmax are numbers, vmax also 'auto'; got {vmin!r} and {vmax!r}."
            raise InputError(message) from error
        if not low < high < np.inf:
            message = f"vmin must be less than vmax, and finite; got {low:g} and {high:g}."
            raise InputError(message)
        is_default = (low, high) == self.limits
        return ColorScale(
            colors=self.colors if cmap is None else colormap(cmap),
            limits=(low, high),
            label=label,
            ticks=self.ticks if is_default else (),
            # Beyond rounding: φ of equal subspaces is 1 up to the last bits.
            below=bool(array.count() and array.min() < low - 1e-6),
            above=bool(array.count() and array.max() > high + 1e-6),
        )

    def image_options(self, blank: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of ``imshow``, the user's over the defaults."""
        defaults = {
            "cmap": self.colors.with_extremes(bad=blank),
            "norm": Normalize(*self.limits),
            "interpolation": "nearest",
        }
        return style.merge_kwargs(AxesImage, defaults, kwargs)


def colormap(cmap: object) -> Colormap:
    """Return a colormap by its name; InputError with near names if there is none."""
    if isinstance(cmap, Colormap):
        return cmap
    if isinstance(cmap, str) and cmap in mpl.colormaps:
        return mpl.colormaps[cmap]
    message = f"matplotlib has no colormap {cmap!r}.{did_you_mean(str(cmap), mpl.colormaps)}"
    raise InputError(message)


# White at 0, purple above, orange below. Cut out of a symmetric color-blind-safe map, so that equal
# distances from 0 look alike.
_EXCESS_COLORS = mpl.colormaps["PuOr"](
    np.linspace(0.5 + EXCESS_LIMITS[0] / 2, 0.5 + EXCESS_LIMITS[1] / 2, 384)
)
EXCESS_SCALE = ColorScale(
    ListedColormap(_EXCESS_COLORS, name="excess"), EXCESS_LIMITS, EXCESS, (-0.5, 0.0, 0.5, 1.0)
)


def phi_scale() -> ColorScale:
    """Return the colors of φ: 0 to 1, in viridis or in the user's ``image.cmap``."""
    colors = colormap(mpl.rcParams["image.cmap"])
    return ColorScale(colors, (0.0, 1.0), PHI, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))


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
    scale: ColorScale
    chance: tuple[float, float] | None
    xlabel: str
    ylabel: str
    title: str
    note: str = ""
    quantity: str = "φ"


def _axis_name(index: str, label: str) -> str:
    """Return the name of an axis of directions, on two lines if the label is long."""
    label = style.drawable_text(label, 24)
    return f"{index}: directions of{' ' if len(label) <= 12 else chr(10)}{label}"


def resolve_similarity(
    grid: SimilarityGrid,
    *,
    zoom: int | None = None,
    excess: bool = False,
    title: str | None = None,
    options: ColorOptions | None = None,
) -> HeatMap:
    """Resolve the data that `plot_similarity` draws."""
    rows, columns = grid.values.shape
    left_out = np.zeros((rows, columns), dtype=bool)
    if zoom is not None:
        if zoom < 1:
            message = f"zoom is a number of directions, at least 1, got {zoom}."
            raise InputError(message)
        rows = columns = min(zoom, rows, columns)
        left_out = np.triu(np.ones((rows, columns), dtype=bool), k=1)
    corner = slice(rows), slice(columns)
    i, j = grid.rows_degeneracy, grid.columns_degeneracy
    degenerate = i.degenerate[:, None] | j.degenerate[None, :]  # (k1, k2)
    nearly_degenerate = i.nearly_degenerate[:, None] | j.nearly_degenerate[None, :]
    degenerate = degenerate[corner] & ~left_out
    nearly_degenerate = nearly_degenerate[corner] & ~left_out & ~degenerate
    values = (grid.excess if excess else grid.values)[corner]
    data = np.ma.masked_where(left_out | degenerate | ~np.isfinite(values), values)
    expected = grid.chance[corner][~left_out]
    has_band = not excess and expected.size > 0 and bool(np.isfinite(expected).all())
    empty = [
        style.drawable_text(label, 24)
        for label, size in zip(grid.labels, grid.values.shape, strict=True)
        if not size
    ]
    return HeatMap(
        data=data,
        degenerate=degenerate,
        nearly_degenerate=nearly_degenerate,
        scale=(EXCESS_SCALE if excess else phi_scale()).with_range(data, options or {}),
        chance=(float(expected.min()), float(expected.max())) if has_band else None,
        xlabel=_axis_name("j", grid.labels[1]),
        ylabel=_axis_name("i", grid.labels[0]),
        title=style.drawable_text(grid.module if title is None else title),
        note=f"{' and '.join(empty)}:\nuntrained, no directions" if empty else "",
        quantity="excess φ" if excess else "φ",
    )


def paint_heatmap(ax: Axes, heatmap: HeatMap, *, side: float = 2.0, **kwargs: Any) -> AxesImage:
    """Draw a resolved heat-map; return its image, to which a color bar can belong.

    ``side`` is the room along each axis in inches: it limits the number of tick labels. ``kwargs``
    go to ``imshow``.
    """
    look = style.look(ax)
    rows, columns = heatmap.data.shape
    # Cell (i, j) is centered on (j, i), and i grows downward.
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5) if heatmap.data.size else (0, 1, 1, 0)
    defaults = {"extent": extent, "aspect": "auto"}
    image = ax.imshow(
        heatmap.data if heatmap.data.size else np.ma.array([[0.0]], mask=True),
        **heatmap.scale.image_options(look.blank, defaults | kwargs),
    )
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    style.set_label(ax, "x", heatmap.xlabel)
    style.set_label(ax, "y", heatmap.ylabel)
    set_title(ax, heatmap.title, 72 * side)
    if heatmap.data.size:
        hatch_cells(look, heatmap.degenerate, "degenerate")
        flagged = heatmap.nearly_degenerate
        if flagged.any():
            hatch_cells(look, flagged, "nearly degenerate", image.to_rgba(heatmap.data)[flagged])
        # As many ticks as there is room for.
        room = side / look.scale
        label_width = 0.01 + 0.065 * len(str(columns))
        ax.set_xticks(style.count_ticks(columns, min(9, int(room / label_width))))
        ax.set_yticks(style.count_ticks(rows, min(9, int(room / 0.1))))
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
        ax.set_xticks([])
        ax.set_yticks([])
        ax.text(
            0.5, 0.5, heatmap.note, ha="center", va="center", color=look.muted, parse_math=False,
            transform=ax.transAxes,
        )  # fmt: skip
    return image


def paint_colorbar(
    image: AxesImage, ax: Axes, heatmap: HeatMap, *, inside: bool = False
) -> Colorbar:
    """Draw a color bar as tall as ``ax`` with the random baseline marked next to it.

    It stands at the right of ``ax``, or ``inside`` at the left if ``ax`` is empty.
    """
    look = style.look(ax)
    gap = ScaledTranslation(0.0 if inside else 0.2 * look.scale, 0, ax.figure.dpi_scale_trans)
    bar_axes = ax.inset_axes((0 if inside else 1, 0, 0.06, 1), transform=ax.transAxes + gap)
    bar = ax.figure.colorbar(image, cax=bar_axes, extend=heatmap.scale.extend)
    bar.outline.set_visible(False)
    bar.set_label(heatmap.scale.label)
    if heatmap.scale.ticks and image.get_clim() == heatmap.scale.limits:
        bar.set_ticks(list(heatmap.scale.ticks))
    low, high = image.get_clim()
    if not heatmap.chance or heatmap.chance[0] > high or heatmap.chance[1] < low:
        return bar
    # A line left of the bar over the range of the baseline, clipped to the bar; at least 1 % of the
    # bar, to stay visible.
    shortest = 0.01 * (high - low)
    low, high = np.clip(heatmap.chance, low, high)
    marker_transform = bar_axes.get_yaxis_transform() + ScaledTranslation(
        -0.04 * look.scale, 0, bar_axes.figure.dpi_scale_trans
    )
    (line,) = bar_axes.plot([0, 0], [low, max(high, low + shortest)], transform=marker_transform)
    line.set(
        color=look.ink, linewidth=1.6 * look.scale, solid_capstyle="butt", clip_on=False,
        label="random",
    )  # fmt: skip
    bar_axes.annotate(
        "random",
        (0, low),
        xycoords=marker_transform,
        xytext=(-1.5 * look.scale, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=look.small,
        color=look.muted,
    )
    return bar


def plot_similarity(
    a: Any,
    b: Any = None,
    ax: Axes | None = None,
    *,
    side: Side | None = None,
    of: VectorsOf = "delta",
    zoom: int | None = None,
    excess: bool = False,
    colorbar: bool = True,
    title: str | None = None,
    cmap: str | Colormap | None = None,
    vmin: float | None = None,
    vmax: float | Literal["auto"] | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw φ(i, j) as a heat-map, i down and j across, both from 1 (LoRA, Figures 3 and 4).

    0 (dark) is orthogonal, 1 (bright) means that the smaller subspace is contained in the larger.
    The bar next to the color scale spans the random baseline, max(i, j)/d, over the drawn cells.

    Cells whose subspace is undefined (coinciding singular values) are gray and cross-hatched;
    nearly degenerate ones (relative gap below 0.05) carry light lines: read
    nothing from a single one of them.

    Parameters
    ----------
    a
        A grid from `subspace_similarity`; a matrix of values φ(i, j), of which the random baseline
        is not known; or an update, in any form that :func:`as_update` takes.
    b
        With an update, the other update of the same module. Axes in its place are taken as ``ax``.
    side, of
        For two updates, as for `subspace_similarity`.
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
    cmap
        Colormap or its name; by default the user's ``image.cmap``, for excess purple and orange.
    vmin, vmax
        Values of the first and last color, by default 0 and 1 (excess: −0.5 and 1), so that
        figures can be compared. ``vmax="auto"`` is the largest drawn value; the color bar says so.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``imshow``.

    Returns
    -------
    Axes
        With the drawn values as its only image.

    Raises
    ------
    InputError
        ``zoom`` is below 1, ``cmap`` is unknown, or ``vmin`` is not below ``vmax``; or ``a`` and
        ``b`` are none of the above, or whole adapters of several modules.
    """
    if isinstance(b, Axes):
        b, ax = None, b
    if isinstance(a, SimilarityGrid):
        grid = a
    elif b is not None:
        grids = subspace_similarity(a, b, side=side, of=of)
        if not isinstance(grids, SimilarityGrid) and len(grids) > 1:
            message = (
                f"A heat map shows one module, but {grids.label} have {len(grids)} in common. "
                f"Choose one: plot_similarity(a['{next(iter(grids))}'], b[…])."
            )
            raise InputError(message)
        grid = grids if isinstance(grids, SimilarityGrid) else next(iter(grids.values()))
    else:
        values = linalg.to_numpy(a) if linalg.is_array(a) or isinstance(a, list | tuple) else None
        if values is None or values.ndim != 2 or values.dtype.kind not in "fiu":
            message = (
                f"A heat map cannot be drawn of a {type(a).__name__}. Accepted: a SimilarityGrid, "
                "a matrix of values φ(i, j), or two updates of one module."
            )
            raise InputError(message)
        fine = [Degeneracy(np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)) for n in values.shape]
        grid = SimilarityGrid(
            values=values.astype(np.float64),
            chance=np.full(values.shape, np.nan),
            dimension=0,
            module="",
            side=side or default_side(of),
            of=of,
            labels=("first", "second"),
            rows_degeneracy=fine[0],
            columns_degeneracy=fine[1],
        )
    options = ColorOptions(cmap=cmap, vmin=vmin, vmax=vmax)
    heatmap = resolve_similarity(grid, zoom=zoom, excess=excess, title=title, options=options)
    rows, columns = heatmap.data.shape
    shape = float(np.clip(rows / max(columns, 1), 0.6, 1.0)) if rows else 1.0
    size = (style.ONE_COLUMN, 0.65 + 2.05 * shape)
    with style.drawing(ax, size, figsize=figsize) as look:
        if ax is None:
            look.ax.set_box_aspect(shape)
        width = look.ax.bbox.width / look.ax.figure.dpi
        image = paint_heatmap(look.ax, heatmap, side=width, **kwargs)
        if colorbar:
            paint_colorbar(image, look.ax, heatmap)
    return look.ax
