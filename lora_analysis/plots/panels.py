"""Several heat-maps on one figure, in the layout of the LoRA paper's Figures 3 and 4."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.hatching import hatch_legend
from lora_analysis.plots.heatmap import (
    HeatMap,
    paint_colorbar,
    paint_heatmap,
    resolve_similarity,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lora_analysis.similarity import SimilarityGrid

# Above this, the random baseline is visible as color, and a second row without it is drawn.
SMALL_CHANCE = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One heat-map of a figure: a grid, its title, and how to draw it (see `plot_similarity`)."""

    grid: SimilarityGrid
    title: str
    zoom: int | None = None
    excess: bool = False

    def resolve(self) -> HeatMap:
        """Return the data of the panel."""
        return resolve_similarity(self.grid, zoom=self.zoom, excess=self.excess, title=self.title)


def figure_grid(
    rows: Sequence[Sequence[Panel]], *, title: str = "", width: float = style.TWO_COLUMNS
) -> Figure:
    """Draw rows of heat-maps of equal size, one color bar per row.

    Parameters
    ----------
    rows
        Panels from left to right; a row holds either φ or excess φ, not both. Shorter rows
        leave room at the right.
    title
        Heading above all panels; long ones are wrapped.
    width
        In inches: 7.0 spans two columns of a paper, 3.3 one.

    Raises
    ------
    InputError
        No panel, or a row that mixes φ with excess φ.
    """
    if not rows or not all(rows):
        message = "A figure needs at least one panel in every row."
        raise InputError(message)
    for row in rows:
        if len({panel.excess for panel in row}) > 1:
            message = "A row of panels shares one color bar: draw φ and its excess separately."
            raise InputError(message)
    columns = max(len(row) for row in rows)
    bar = 1.1 if any(panel.excess for row in rows for panel in row) else 0.8
    side = (width - bar) / columns - 0.25  # what is left next to labels and the color bar
    headline = textwrap.wrap(style.plain(title, 200), int(16 * width))
    with style.house_style():
        figure = style.PanelFigure(
            figsize=(width, len(rows) * (side + 0.55) + 0.05 + 0.15 * len(headline)),
            layout="constrained",
        )
        axes = figure.subplots(len(rows), columns, squeeze=False)
        maps: list[HeatMap] = []
        for row, row_axes in zip(rows, axes, strict=True):
            maps += _paint_row(row, list(row_axes), side)
        hatch_legend(
            figure,
            degenerate=any(m.degenerate.any() for m in maps),
            nearly_degenerate=any(m.nearly_degenerate.any() for m in maps),
        )
        if headline:
            figure.suptitle("\n".join(headline), parse_math=False)
    return figure


def _paint_row(row: Sequence[Panel], axes: list[Axes], side: float) -> list[HeatMap]:
    """Draw one row of panels; return what they show."""
    maps = [panel.resolve() for panel in row]
    for ax in axes:
        ax.set_box_aspect(1)
    for spare in axes[len(row) :]:
        spare.set_axis_off()
    images = [paint_heatmap(ax, m, side=side) for ax, m in zip(axes, maps, strict=False)]
    for ax, panel in zip(axes, row, strict=False):
        ax.set_xlabel("j")
        ax.set_ylabel("i" if panel is row[0] else "")
    short = len(row) < len(axes)  # a bar at the right of its last panel would widen that column
    paint_colorbar(images[-1], axes[len(row) - (not short)], _summary(maps), inside=short)
    return maps


def _summary(maps: Sequence[HeatMap]) -> HeatMap:
    """Return a heat-map that stands for the row on its color bar: all of its chance."""
    spans = [m.chance for m in maps if m.chance]
    chance = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
    return replace(maps[0], below=any(m.below for m in maps), chance=chance)


def _rows(panels: Sequence[Panel], width: float) -> list[list[Panel]]:
    """Break a row of panels in two where one column of a paper has no room for it."""
    per_row = len(panels) if width >= 5 or len(panels) < 3 else -(-len(panels) // 2)
    return [list(panels[start : start + per_row]) for start in range(0, len(panels), per_row)]


def _headline(grids: Sequence[SimilarityGrid]) -> str:
    """Return the headline that all grids share (adapters, side, vectors), or an empty one."""
    shared = {(grid.labels, grid.side, grid.of) for grid in grids}
    if len(shared) != 1:
        return ""
    (labels, side, factor) = shared.pop()
    of = "ΔW" if factor == "delta" else factor
    return f"φ({labels[0]}, {labels[1]}, i, j), {side} directions of {of}"


def figure_ranks(
    grids: Mapping[str, SimilarityGrid],
    *,
    zoom: int = 8,
    above_chance: bool | None = None,
    title: str | None = None,
    width: float = style.TWO_COLUMNS,
) -> Figure:
    """Draw two ranks against each other as the LoRA paper's Figure 3: whole grids, then zoomed.

    Parameters
    ----------
    grids
        Panel title (``"ΔWq"``, ``"ΔWv"``) to grid, the smaller rank first in each grid.
    zoom
        Corner and triangle of the zoomed panels, see `plot_similarity`.
    above_chance
        Whether to add the same panels as excess φ; by default where chance exceeds 0.05
        in some grid (the paper's 64 of 12,288 dimensions give 0.005).
    title
        One line above everything; by default the adapters, side and factor that all grids share.
    width
        In inches; below 5 the panels break into two rows.
    """
    whole = [(name, grid, None) for name, grid in grids.items()]
    corner = [(f"{name}, j ≤ i", grid, zoom) for name, grid in grids.items()]
    headline = _headline(list(grids.values())) if title is None else title
    return _figure([*whole, *corner], above_chance, headline, width)


def figure_seeds(
    grids: Mapping[str, SimilarityGrid],
    *,
    above_chance: bool | None = None,
    title: str | None = None,
    width: float = style.TWO_COLUMNS,
) -> Figure:
    """Draw two seeds against each other as the LoRA paper's Figure 4, with a random panel.

    Parameters
    ----------
    grids
        Panel title to grid: one per module, and last the grid of two random matrices of the same
        shape, which shows what no agreement looks like.
    above_chance, title, width
        As in `figure_ranks`.
    """
    measured = list(grids.values())[: max(len(grids) - 1, 1)]
    headline = _headline(measured) if title is None else title
    panels = [(name, grid, None) for name, grid in grids.items()]
    return _figure(panels, above_chance, headline, width)


def figure_layers(
    layers: Mapping[str, Mapping[str, SimilarityGrid]],
    *,
    zoom: int | None = 8,
    excess: bool = False,
    title: str | None = None,
    width: float = style.TWO_COLUMNS,
) -> Figure:
    """Draw several layers below each other, as the LoRA paper's Figures 6 (two ranks) and 7.

    Parameters
    ----------
    layers
        Name of the row (``"layer 1"``) to panel title to grid.
    zoom
        Adds the corner and triangle to every row, as Figure 6 has them; None leaves them out, as
        Figure 7.
    excess
        Whether to draw excess φ.
    title, width
        As in `figure_ranks`.
    """
    rows = []
    for row, grids in layers.items():
        whole = [Panel(grid, f"{name}, {row}", None, excess) for name, grid in grids.items()]
        corner = [
            Panel(grid, f"{name}, {row}, j ≤ i", zoom, excess) for name, grid in grids.items()
        ]
        rows.append([*whole, *(corner if zoom else ())])
    every = [grid for grids in layers.values() for grid in grids.values()]
    return figure_grid(rows, title=_headline(every) if title is None else title, width=width)


def _figure(
    panels: Sequence[tuple[str, SimilarityGrid, int | None]],
    above_chance: bool | None,
    title: str,
    width: float,
) -> Figure:
    """Draw the panels as φ and, where asked or where chance is visible, again above chance."""
    visible = any(grid.chance.size and grid.chance.max() > SMALL_CHANCE for _, grid, _ in panels)
    has_excess = visible if above_chance is None else above_chance
    rows = [
        row
        for excess in ((False, True) if has_excess else (False,))
        for row in _rows([Panel(g, name, zoom, excess) for name, g, zoom in panels], width)
    ]
    return figure_grid(rows, title=title, width=width)
