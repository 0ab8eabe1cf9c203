"""Several heat-maps on one figure, in the layout of the LoRA paper's Figures 3 and 4."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.hatching import hatch_legend
from lora_analysis.plots.heatmap import (
    ColorOptions,
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
        """Return the data of the panel, its axes named briefly."""
        heatmap = resolve_similarity(
            self.grid, zoom=self.zoom, excess=self.excess, title=self.title
        )
        i, j = (style.drawable_text(label, 14) for label in self.grid.labels)
        return replace(heatmap, ylabel=f"i: {i}", xlabel=f"j: {j}")


def figure_grid(
    rows: Sequence[Sequence[Panel]],
    *,
    title: str = "",
    width: float = style.TWO_COLUMNS,
    **colors: Unpack[ColorOptions],
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
        In inches: 7.0 spans two columns of a paper, 3.3 one, 10 to 13 a slide. The text grows
        with it.
    **colors
        ``cmap``, ``vmin`` and ``vmax`` as in `plot_similarity`, of the panels of φ; those of excess
        φ next to them keep their own, in which 0 is white. ``vmax="auto"`` is the largest value of
        all these panels.

    Raises
    ------
    InputError
        No panel, a row that mixes φ with excess φ, or wrong colors.
    """
    if not rows or not all(rows):
        message = "A figure needs at least one panel in every row."
        raise InputError(message)
    for row in rows:
        if len({panel.excess for panel in row}) > 1:
            message = "A row of panels shares one color bar: draw φ and its excess separately."
            raise InputError(message)
    # The panels of φ, or else all of them, share the user's colors.
    maps = [[panel.resolve() for panel in row] for row in rows]
    only_excess = all(panel.excess for row in rows for panel in row)
    chosen = [i for i, panels in enumerate(rows) if panels[0].excess == only_excess]
    values = [heatmap.data.compressed() for i in chosen for heatmap in maps[i]]
    shared = maps[chosen[0]][0].scale.with_range(np.concatenate(values), colors)
    for i in chosen:
        maps[i] = [replace(heatmap, scale=shared) for heatmap in maps[i]]
    columns = max(len(row) for row in rows)
    with style.house_style(width):
        scale = style.font_scale()
        bar = (1.1 if any(panels[0].excess for panels in rows) else 0.8) * scale
        # What is left next to labels and the color bar.
        side = max((width - bar) / columns - 0.25 * scale, 0.1)
        headline = textwrap.wrap(style.drawable_text(title, 200), max(int(16 * width / scale), 1))
        lines = scale * (0.05 + 0.15 * len(headline))
        figure = style.PanelFigure(
            figsize=(width, len(rows) * (side + 0.55 * scale) + lines), layout="constrained"
        )
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for heatmaps, row_axes in zip(maps, axes, strict=True):
            _paint_row(heatmaps, list(row_axes), side)
        drawn = [heatmap for row in maps for heatmap in row]
        hatch_legend(
            figure,
            drawn[0].scale.colors,
            crossed=any(heatmap.degenerate.any() for heatmap in drawn),
            striped=any(heatmap.nearly_degenerate.any() for heatmap in drawn),
        )
        if headline:
            figure.suptitle("\n".join(headline), parse_math=False)
    return figure


def _paint_row(maps: list[HeatMap], axes: list[Axes], side: float) -> None:
    """Draw one row of panels; i is named where it belongs to another adapter than on the left."""
    for ax in axes:
        ax.set_box_aspect(1)
    for spare in axes[len(maps) :]:
        spare.set_axis_off()
    images = [paint_heatmap(ax, m, side=side) for ax, m in zip(axes, maps, strict=False)]
    for ax, left, heatmap in zip(axes[1:], maps, maps[1:], strict=False):
        if heatmap.ylabel == left.ylabel:
            ax.set_ylabel("")
    # One color bar for the row: it marks the random baseline of all panels.
    spans = [m.chance for m in maps if m.chance]
    chance = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
    scale = replace(
        maps[0].scale,
        below=any(m.scale.below for m in maps),
        above=any(m.scale.above for m in maps),
    )
    short = len(maps) < len(axes)  # a bar at the right of its last panel would widen that column
    whole = replace(maps[0], scale=scale, chance=chance)
    paint_colorbar(images[-1], axes[len(maps) - (not short)], whole, inside=short)


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
    excess: bool | None = None,
    title: str | None = None,
    width: float = style.TWO_COLUMNS,
    **colors: Unpack[ColorOptions],
) -> Figure:
    """Draw two ranks against each other as the LoRA paper's Figure 3: whole grids, then zoomed.

    Parameters
    ----------
    grids
        Panel title (``"ΔWq"``, ``"ΔWv"``) to grid, the smaller rank first in each grid.
    zoom
        Corner and triangle of the zoomed panels, see `plot_similarity`.
    excess
        Whether to add the same panels as excess over the random baseline; by default if the
        baseline exceeds 0.05 in some grid (the paper's 64 of 12,288 dimensions give 0.005).
    title
        One line above everything; by default the adapters, side and factor that all grids share.
    width
        In inches; below 5 the panels break into two rows.
    **colors
        As in `figure_grid`.
    """
    whole = [(name, grid, None) for name, grid in grids.items()]
    corner = [(f"{name}, j ≤ i", grid, zoom) for name, grid in grids.items()]
    headline = _headline(list(grids.values())) if title is None else title
    return _figure([*whole, *corner], excess, headline, width, colors)


def figure_seeds(
    grids: Mapping[str, SimilarityGrid],
    *,
    excess: bool | None = None,
    title: str | None = None,
    width: float = style.TWO_COLUMNS,
    **colors: Unpack[ColorOptions],
) -> Figure:
    """Draw two seeds against each other as the LoRA paper's Figure 4, with a random panel.

    Parameters
    ----------
    grids
        Panel title to grid: one per module, and last the grid of two random matrices of the same
        shape, which shows what no agreement looks like.
    excess, title, width, **colors
        As in `figure_ranks`.
    """
    measured = list(grids.values())[: max(len(grids) - 1, 1)]
    headline = _headline(measured) if title is None else title
    panels = [(name, grid, None) for name, grid in grids.items()]
    return _figure(panels, excess, headline, width, colors)


def figure_layers(
    layers: Mapping[str, Mapping[str, SimilarityGrid]],
    *,
    zoom: int | None = 8,
    excess: bool = False,
    title: str | None = None,
    width: float = style.TWO_COLUMNS,
    **colors: Unpack[ColorOptions],
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
    title, width, **colors
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
    headline = _headline(every) if title is None else title
    return figure_grid(rows, title=headline, width=width, **colors)


def _figure(
    panels: Sequence[tuple[str, SimilarityGrid, int | None]],
    excess: bool | None,
    title: str,
    width: float,
    colors: ColorOptions,
) -> Figure:
    """Draw φ, then its excess over the random baseline if requested or if that is visible."""
    visible = any(grid.chance.size and grid.chance.max() > SMALL_CHANCE for _, grid, _ in panels)
    both_kinds = visible if excess is None else excess
    # One column of a paper has no room for more than two panels next to each other.
    per_row = len(panels) if width >= 5 or len(panels) < 3 else -(-len(panels) // 2)
    rows = [
        [Panel(grid, name, zoom, of_excess) for name, grid, zoom in panels[start : start + per_row]]
        for of_excess in ((False, True) if both_kinds else (False,))
        for start in range(0, len(panels), per_row)
    ]
    return figure_grid(rows, title=title, width=width, **colors)
