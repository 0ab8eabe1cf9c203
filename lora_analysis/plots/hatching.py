"""Lines over cells of a heat-map that must not be read as they stand."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline

from lora_analysis.plots import style

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType
    from numpy.typing import NDArray

    from lora_analysis.plots.style import Look


def rectangles(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int, int, int]]:
    """Cut the true cells into rectangles (top, bottom, left, right), few where rows are alike."""
    top = 0
    for row, alike in groupby(map(tuple, mask.tolist())):
        bottom = top + len(list(alike))
        edges = np.flatnonzero(np.diff(np.concatenate(([False], row, [False])).astype(int)))
        for left, right in edges.reshape(-1, 2).tolist():
            yield top, bottom, left, right
        top = bottom


def hatch_cells(
    look: Look, mask: NDArray[np.bool_], label: str, cells: NDArray[np.float64] | None = None
) -> None:
    """Hatch the true cells with one patch; nothing if there are none.

    ``cells`` are their RGBA colors, on which diagonal lines are drawn; without, the cells are blank
    and crossed.
    """
    boxes = [
        Outline(
            [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)],
            [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY],
        )
        for y0, y1, x0, x1 in (
            (top + 0.5, bottom + 0.5, left + 0.5, right + 0.5)
            for top, bottom, left, right in rectangles(mask)
        )
    ]
    if boxes:
        patch = PathPatch(
            Outline.make_compound_path(*boxes),
            linewidth=0,
            label=label,
            facecolor="none",
            edgecolor=_hatch_color(look, cells),
            hatch="xxxx" if cells is None else "////",
        )
        look.ax.add_patch(patch)


def _hatch_color(look: Look, cells: NDArray[np.float64] | None, alpha: float = 0.35) -> ColorType:
    if mpl.rcParams["hatch.color"] != mpl.rcParamsDefault["hatch.color"]:
        return str(mpl.rcParams["hatch.color"])
    if cells is None:
        return look.crossed
    color = look.visible_on(cells)
    return color, alpha * (1 if color == look.paper else 0.6)


def hatch_legend(figure: Figure, colors: Colormap, *, crossed: bool, striped: bool) -> None:
    """Add a legend of the kinds of lines that a figure of heat-maps has, below its panels.

    ``crossed`` cells are degenerate, ``striped`` ones, of medium color, nearly degenerate.
    """
    look = style.look(figure.axes[0])
    handles = []
    if striped:
        medium = colors(0.4)
        handles.append(
            Patch(
                facecolor=medium,
                edgecolor=_hatch_color(look, np.array(medium), 0.8),
                hatch="////",
                linewidth=0,
                label="nearly degenerate: σ within 5 %, so noise can rotate the direction",
            )
        )
    if crossed:
        handles.append(
            Patch(
                facecolor=look.blank,
                edgecolor=_hatch_color(look, None),
                hatch="xxxx",
                linewidth=0,
                label="degenerate: equal σ, so no direction is defined",
            )
        )
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=1, handlelength=2.5)
